#include "training_data.hpp"

#include "digest.hpp"

#include <algorithm>
#include <numeric>
#include <random>

namespace tool {

bool held_out(std::string_view package, double share) {
    Digest digest;
    digest.add_text(package);
    return double(digest.number() >> 11) * 0x1p-53 < share;
}

namespace {

class Pieces : public Units {
public:
    Pieces(const DataSplit &split, uint64_t chunk, uint64_t most) : split_(split) {
        for (uint32_t p = 0; p < split.parts().size(); ++p) {
            const uint64_t chunks = split.parts()[p].count / chunk;
            const uint64_t pieces = (chunks + most - 1) / most;
            for (uint64_t i = 0; i < pieces; ++i) {
                const uint64_t begin = i * chunks / pieces, end = (i + 1) * chunks / pieces;
                if (end - begin >= 2)
                    pieces_.push_back({p, begin * chunk, (end - begin) * chunk});
            }
        }
    }
    uint64_t count() const override { return pieces_.size(); }
    void read(uint64_t unit, std::vector<int32_t> &to) const override {
        const Piece &piece = pieces_[unit];
        split_.parts()[piece.part].read(piece.first, piece.count, to);
    }

private:
    struct Piece {
        uint32_t part;
        uint64_t first, count;
    };
    const DataSplit &split_;
    std::vector<Piece> pieces_;
};

class Windows : public Units {
public:
    Windows(const DataSplit &split, uint64_t context) : split_(split), context_(context) {
        uint64_t total = 0;
        for (const DataSplit::Part &part : split.parts()) {
            start_.push_back(total);
            total += part.count;
        }
        count_ = total > 0 ? (total - 1) / context : 0;
    }
    uint64_t count() const override { return count_; }
    void read(uint64_t unit, std::vector<int32_t> &to) const override {
        uint64_t at = unit * context_, left = context_ + 1;
        auto p = size_t(std::upper_bound(start_.begin(), start_.end(), at) - start_.begin()) - 1;
        for (; left > 0; ++p) {
            const DataSplit::Part &part = split_.parts()[p];
            const uint64_t offset = at - start_[p], taken = std::min(left, part.count - offset);
            part.read(offset, taken, to);
            at += taken;
            left -= taken;
        }
    }

private:
    const DataSplit &split_;
    uint64_t context_, count_ = 0;
    std::vector<uint64_t> start_; // of each part in the row
};

} // namespace

std::unique_ptr<Units> make_pieces(const DataSplit &split, uint64_t chunk, uint64_t most) {
    return std::make_unique<Pieces>(split, chunk, most);
}

std::unique_ptr<Units> make_windows(const DataSplit &split, uint64_t context) {
    return std::make_unique<Windows>(split, context);
}

Order::Order(uint64_t count, uint64_t seed) : seed_(seed) {
    if (count > UINT32_MAX)
        throw Failure(exit_file, "too much training data for one run");
    permutation_.resize(count);
}

uint64_t Order::unit(uint64_t position) {
    const uint64_t round = position / permutation_.size();
    if (round != round_) {
        round_ = round;
        std::iota(permutation_.begin(), permutation_.end(), 0u);
        std::mt19937_64 random(seed_ * 0x9e3779b97f4a7c15u + round);
        // Fisher and Yates; std::shuffle may differ from library to library.
        for (size_t i = permutation_.size(); i > 1; --i)
            std::swap(permutation_[i - 1], permutation_[random() % i]);
    }
    return permutation_[position % permutation_.size()];
}

} // namespace tool
