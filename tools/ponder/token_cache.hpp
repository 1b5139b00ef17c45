// Training data as token ids in one memory-mapped file, made once for a content and a tokenizer.
//
//   header, ids (2 or 4 bytes each), index: for every run its first id, its key, its package's name
//
// A run is what follows one another of a package: its documents, each after <|endoftext|>.
#pragma once

#include "data_source.hpp"
#include "setup.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

class TokenCache {
public:
    struct Run {
        std::string_view package;
        uint64_t key;          // see PackageKey
        uint64_t first, count; // ids
    };

    // The file of this content and tokenizer in the cache folder; made, in bounded memory, if it
    // is not there or damaged. Throws Failure.
    TokenCache(DataSource &source, const ponder_model *model, const std::string &model_folder,
               const std::string &cache_folder, bool quiet);

    const std::string &key() const { return key_; } // of content and tokenizer
    const std::vector<Run> &runs() const { return runs_; }
    uint64_t tokens() const { return tokens_; }
    // Appends `count` ids from `first` on.
    void read(uint64_t first, uint64_t count, std::vector<int32_t> &to) const;

private:
    bool open(const std::string &path, bool quiet);

    std::string key_;
    std::shared_ptr<const std::byte> map_;
    const std::byte *ids_ = nullptr;
    uint64_t tokens_ = 0;
    uint32_t width_ = 2;
    std::vector<Run> runs_;
};

// --cache, $XDG_CACHE_HOME/ponder, ~/.cache/ponder; made if it is not there.
std::string cache_folder(const std::string &given);

} // namespace tool
