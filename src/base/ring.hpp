// Processes that compute together, joined in a ring over TCP: each sends to the next one. For sums
// that all of them need; every process gets the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace ponder {

class Ring {
public:
    struct Place {
        uint32_t rank, count;
        std::string address; // HOST:PORT, at which process 0 waits for the others
        std::string job;     // the same text in all of them, or they do not join
        double patience;     // seconds without a byte after which a call gives up
    };
    // Waits for all processes. PONDER_E_ARGUMENT: the place makes no sense; PONDER_E_IO: the others
    // do not come; PONDER_E_MISMATCH: they come with another job. There is no secret between
    // processes and nothing is encrypted: for networks that one trusts.
    Ring(const Place &place, const std::function<void()> &check);
    ~Ring();
    Ring(const Ring &) = delete;
    Ring &operator=(const Ring &) = delete;

    uint32_t rank() const { return rank_; }
    uint32_t count() const { return count_; }

    // What every process gave, in the order of ranks. PONDER_E_IO when one has gone; the ring is
    // then of no more use. `check` is called while waiting and may throw, with the same outcome.
    std::vector<std::vector<std::byte>> gather(std::span<const std::byte> own,
                                               const std::function<void()> &check);
    // values = their sum over all processes, in an order that depends on the count only.
    void sum(std::span<float> values, const std::function<void()> &check);

private:
    // Sends to the next process while receiving from the one before.
    void exchange(std::span<const std::byte> out, std::span<std::byte> in,
                  const std::function<void()> &check);

    uint32_t rank_, count_;
    double patience_;
    int next_ = -1, previous_ = -1;
    bool broken_ = false;
};

} // namespace ponder
