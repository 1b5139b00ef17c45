// The log of a training run: JSON Lines, one object a step.
#pragma once

#include "common.hpp"

#include <optional>
#include <string>

namespace tool {

struct Validation {
    double loss = 0; // mean chunk loss, nats
    double cost = 0; // inner steps a chunk
    uint64_t chunks = 0;
};

class TrainLog {
public:
    // Goes on after the line of `step`; what a lost continuation wrote after it is cut off. With
    // no step the log begins anew. Throws Failure.
    TrainLog(const std::string &path, std::optional<uint64_t> step);
    ~TrainLog();
    TrainLog(const TrainLog &) = delete;

    void add(const ponder_train_record &record);
    void add_start(); // a line for step 0, before any training
    // Into the line that was added last, or the one that the log goes on after.
    void add(const Validation &validation);
    bool validated() const { return validated_; } // that line has its validation
    void sync() const;                            // to the disk

private:
    uint64_t find_end(uint64_t step);
    void write(const std::string &text);

    std::string path_;
    int fd_ = -1;
    bool validated_ = false;
};

} // namespace tool
