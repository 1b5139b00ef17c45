#include "package_key.hpp"

#include <optional>

namespace tool {

std::vector<uint64_t> package_keys(DataSource &source) {
    std::vector<uint64_t> keys;
    std::optional<PackageKey> open;
    DataText text;
    source.rewind();
    while (source.next(text)) {
        if (!open || !open->covers(text)) {
            if (open)
                keys.push_back(open->number());
            open.emplace(text);
        }
        open->add(text);
    }
    if (open)
        keys.push_back(open->number());
    source.rewind();
    return keys;
}

} // namespace tool
