// What tells whether a package of one source is also in another: its name where the data declare
// one; its texts where the name was made up of a file's, which others may have as well.
#pragma once

#include "data_source.hpp"
#include "digest.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace tool {

// Of a run of texts, which belong to one package and follow one another.
class PackageKey {
public:
    explicit PackageKey(const DataText &first)
        : package_(first.package), declared_(first.declared), path_(first.path) {
        digest_.add_number(declared_);
        if (declared_)
            digest_.add_text(package_);
    }
    bool covers(const DataText &text) const {
        return text.package == package_ && text.declared == declared_ &&
               (declared_ || text.path == path_);
    }
    void add(const DataText &text) {
        if (declared_)
            return;
        if (text.begins)
            digest_.add_number(0);
        digest_.add(text.text.data(), text.text.size());
    }
    const std::string &package() const { return package_; }
    uint64_t number() const { return digest_.number(); }

private:
    std::string package_;
    bool declared_;
    size_t path_;
    Digest digest_;
};

// Of every run of a source, in order; reads all of it.
std::vector<uint64_t> package_keys(DataSource &source);

} // namespace tool
