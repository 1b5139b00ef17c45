#include "formats/byte_pairs.hpp"

#include <algorithm>
#include <bit>
#include <functional>

namespace ponder {

namespace {

// Up to here, looking at every pair for each merge is faster than a heap.
constexpr size_t short_word = 48;

} // namespace

BytePairs::BytePairs(size_t merges) : slots_(std::bit_ceil(std::max<size_t>(16, 2 * merges))) {}

size_t BytePairs::slot_of(uint64_t pair) const {
    size_t mask = slots_.size() - 1;
    uint64_t mixed = pair * 0x9e3779b97f4a7c15u;
    size_t slot = size_t(mixed ^ (mixed >> 32)) & mask;
    while (slots_[slot].pair != pair && slots_[slot].pair != UINT64_MAX)
        slot = (slot + 1) & mask;
    return slot;
}

bool BytePairs::add_merge(int32_t left, int32_t right, int32_t merged) {
    uint64_t pair = uint64_t(uint32_t(left)) << 32 | uint32_t(right);
    if (2 * (count_ + size_t(1)) > slots_.size()) {
        std::vector<Merge> old(2 * slots_.size());
        old.swap(slots_);
        for (const Merge &merge : old)
            if (merge.pair != UINT64_MAX)
                slots_[slot_of(merge.pair)] = merge;
    }
    Merge &merge = slots_[slot_of(pair)];
    if (merge.pair == pair)
        return false;
    merge = {pair, count_++, merged};
    return true;
}

const BytePairs::Merge &BytePairs::find(int32_t left, int32_t right) const {
    return slots_[slot_of(uint64_t(uint32_t(left)) << 32 | uint32_t(right))];
}

void BytePairs::encode(std::string_view word, std::vector<int32_t> &tokens) const {
    if (word.size() <= short_word)
        encode_short(word, tokens);
    else
        encode_long(word, tokens);
}

void BytePairs::encode_short(std::string_view word, std::vector<int32_t> &tokens) const {
    int32_t token[short_word];
    uint32_t rank[short_word]; // of the pair (i, i + 1)
    int32_t merged[short_word];
    size_t count = word.size();
    for (size_t i = 0; i < count; ++i)
        token[i] = byte_token_[uint8_t(word[i])];
    auto look_up = [&](size_t i) {
        const Merge &merge = find(token[i], token[i + 1]);
        rank[i] = merge.rank;
        merged[i] = merge.merged;
    };
    for (size_t i = 0; i + 1 < count; ++i)
        look_up(i);
    while (count > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < count; ++i)
            if (rank[i] < rank[best])
                best = i;
        if (rank[best] == no_rank)
            break;
        token[best] = merged[best];
        --count;
        for (size_t i = best + 1; i < count; ++i)
            token[i] = token[i + 1];
        for (size_t i = best + 1; i + 1 < count; ++i) {
            rank[i] = rank[i + 1];
            merged[i] = merged[i + 1];
        }
        if (best + 1 < count)
            look_up(best);
        if (best > 0)
            look_up(best - 1);
    }
    tokens.insert(tokens.end(), token, token + count);
}

// A heap of (rank, position) over a doubly linked list. An entry may be out of date; it counts
// only while the pair at its position still has its rank.
void BytePairs::encode_long(std::string_view word, std::vector<int32_t> &tokens) const {
    uint32_t count = uint32_t(word.size());
    constexpr uint32_t none = UINT32_MAX;
    struct Symbol {
        int32_t token; // -1 once merged into the one before
        uint32_t before, after;
    };
    std::vector<Symbol> symbols(count);
    for (uint32_t i = 0; i < count; ++i)
        symbols[i] = {byte_token_[uint8_t(word[i])], i == 0 ? none : i - 1,
                      i + 1 == count ? none : i + 1};

    auto merge_at = [&](uint32_t i) -> const Merge * {
        if (symbols[i].token < 0 || symbols[i].after == none)
            return nullptr;
        const Merge &merge = find(symbols[i].token, symbols[symbols[i].after].token);
        return merge.rank == no_rank ? nullptr : &merge;
    };
    std::vector<uint64_t> heap; // rank << 32 | position
    for (uint32_t i = 0; i < count; ++i)
        if (const Merge *merge = merge_at(i))
            heap.push_back(uint64_t(merge->rank) << 32 | i);
    std::make_heap(heap.begin(), heap.end(), std::greater<>());
    auto push = [&](uint32_t i) {
        const Merge *merge = merge_at(i);
        if (!merge)
            return;
        heap.push_back(uint64_t(merge->rank) << 32 | i);
        std::push_heap(heap.begin(), heap.end(), std::greater<>());
    };
    while (!heap.empty()) {
        uint64_t entry = heap.front();
        std::pop_heap(heap.begin(), heap.end(), std::greater<>());
        heap.pop_back();
        uint32_t left = uint32_t(entry);
        const Merge *merge = merge_at(left);
        if (!merge || merge->rank != uint32_t(entry >> 32))
            continue;
        uint32_t right = symbols[left].after, next = symbols[right].after;
        symbols[left].token = merge->merged;
        symbols[left].after = next;
        symbols[right].token = -1;
        if (next != none)
            symbols[next].before = left;
        push(left);
        if (symbols[left].before != none)
            push(symbols[left].before);
    }
    for (uint32_t i = 0; i != none; i = symbols[i].after)
        tokens.push_back(symbols[i].token);
}

} // namespace ponder
