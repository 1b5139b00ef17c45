// What goes to stderr: notes, and a progress line while it is a terminal.
#pragma once

#include <chrono>
#include <string>

namespace tool {

bool stderr_is_terminal();
bool stdout_has_colour(); // a terminal, and NO_COLOR is not set

void note(bool quiet, const std::string &message); // "ponder: message"

// One line that is rewritten at most ten times a second, and removed at the end.
class Progress {
public:
    explicit Progress(bool quiet);
    ~Progress() { clear(); }
    Progress(const Progress &) = delete;

    bool due(); // nothing to build a line for otherwise
    void show(const std::string &line);
    void clear();

private:
    bool on_;
    std::chrono::steady_clock::time_point next_;
};

// `[#####.....]` of a share 0..1.
std::string progress_bar(double share, int width);

} // namespace tool
