#include "train_log.hpp"

#include "json_in.hpp"
#include "json_out.hpp"
#include "source.hpp"

#include <cerrno>
#include <cstring>
#include <map>

#include <fcntl.h>
#include <unistd.h>

namespace tool {

namespace {

[[noreturn]] void fail(const std::string &path) {
    throw Failure(exit_file, path + ": " + std::strerror(errno));
}

} // namespace

TrainLog::TrainLog(const std::string &path, std::optional<uint64_t> step) : path_(path) {
    fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0)
        fail(path);
    try {
        const uint64_t end = step ? find_end(*step) : 0;
        // A pipe or a terminal has no past.
        if (ftruncate(fd_, off_t(end)) == 0)
            lseek(fd_, 0, SEEK_END);
        else if (errno != EINVAL)
            fail(path_);
    } catch (...) {
        ::close(fd_);
        throw;
    }
}

TrainLog::~TrainLog() { ::close(fd_); }

// Bytes of the whole lines up to that step.
uint64_t TrainLog::find_end(uint64_t step) {
    ByteStream bytes(path_, ByteStream::Compressed::as_it_is);
    std::string rest;
    uint64_t end = 0;
    char block[1 << 16];
    while (const size_t got = bytes.read(block, sizeof block)) {
        rest.append(block, got);
        size_t begin = 0;
        for (size_t newline; (newline = rest.find('\n', begin)) != rest.npos; begin = newline + 1) {
            const auto line = std::string_view(rest).substr(begin, newline - begin);
            std::map<std::string, double> numbers;
            try {
                numbers = parse_numbers(line);
            } catch (const std::runtime_error &) {
                return end;
            }
            const auto found = numbers.find("step");
            if (found == numbers.end() || !(found->second <= double(step)))
                return end;
            validated_ = numbers.contains("valid_loss");
            end += newline + 1 - begin;
        }
        rest.erase(0, begin);
    }
    return end;
}

void TrainLog::write(const std::string &text) {
    for (size_t done = 0; done < text.size();) {
        const ssize_t count = ::write(fd_, text.data() + done, text.size() - done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            fail(path_);
        done += size_t(count);
    }
}

void TrainLog::add(const ponder_train_record &r) {
    JsonWriter json;
    json.object(true);
    json.member("step", r.step).member("flags", r.flags).member("tokens", r.tokens);
    json.member("loss", r.loss).member("loss_first", r.loss_first);
    json.member("reconstruction", r.reconstruction).member("gradient_norm", r.gradient_norm);
    json.member("learning_rate", r.learning_rate).member("inner_rate", r.inner_rate);
    json.member("cost", r.cost).member("temperature", r.temperature);
    json.member("tokens_per_second", r.tokens_per_second);
    json.member("flops", r.flops).member("ns", r.ns).end();
    write(json.text() + "\n");
    validated_ = false;
}

void TrainLog::add_start() {
    write("{\"step\": 0}\n");
    validated_ = false;
}

void TrainLog::add(const Validation &validation) {
    JsonWriter json;
    json.object(true).member("valid_loss", validation.loss).member("valid_cost", validation.cost);
    json.member("valid_chunks", validation.chunks).end();
    // Over the "}\n" of the line that is there.
    if (lseek(fd_, -2, SEEK_END) >= 0)
        write(", " + json.text().substr(1) + "\n");
    else
        write(json.text() + "\n");
    validated_ = true;
}

void TrainLog::sync() const {
    if (fdatasync(fd_) != 0 && errno != EINVAL && errno != EROFS)
        fail(path_);
}

} // namespace tool
