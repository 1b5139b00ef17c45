// Data parallel training: processes that take one step together. All are given the same batch, each
// works on its share of the streams, and what they found is put together; so a trajectory does not
// depend on how many there are but for the order of sums, and any number goes on from a checkpoint.
#pragma once

#include "base/options.hpp"
#include "session/session.hpp"

#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

namespace ponder {

class Ring;

class Peers {
public:
    // By the options train.rank, train.world, train.address and train.patience; `job` must be the
    // same in all processes. They join at the first step.
    Peers(const Options &options, std::string job);
    ~Peers();

    bool alone() const { return count_ == 1; }
    // The streams from `begin` to `end` are this process's. PONDER_E_ARGUMENT when a process would
    // have none.
    struct Share {
        size_t begin, end;
    };
    Share share(size_t streams) const;

    // Does this process's part of step `step`. Fails in every process when it fails in one: with
    // the own failure, PONDER_E_CANCELLED for another's, PONDER_E_MISMATCH when they are at
    // different steps.
    void together(uint64_t step, const CallGuard &guard, const std::function<void()> &work);
    // What every process has found, one after the other.
    template <class T> std::vector<T> gather(std::span<const T> own, const CallGuard &guard) {
        static_assert(std::is_trivially_copyable_v<T>);
        std::vector<T> all;
        for (const std::vector<std::byte> &part : gather_bytes(std::as_bytes(own), guard)) {
            all.resize(all.size() + part.size() / sizeof(T));
            if (!part.empty())
                std::memcpy(all.data() + all.size() - part.size() / sizeof(T), part.data(),
                            part.size() / sizeof(T) * sizeof(T));
        }
        return all;
    }
    // values[count] in the device's memory = their sum over all processes: by the devices themselves
    // where they can, else by way of the hosts.
    void sum(const Device &device, float *values, size_t count, const CallGuard &guard);

private:
    Ring &ring(const CallGuard &guard);
    bool group(const Device &device, const CallGuard &guard);
    std::vector<std::vector<std::byte>> gather_bytes(std::span<const std::byte> own,
                                                     const CallGuard &guard);

    uint32_t rank_, count_;
    std::string address_, job_;
    double patience_;
    std::unique_ptr<Ring> ring_;
    enum class Devices { unknown, apart, grouped } devices_ = Devices::unknown;
};

} // namespace ponder
