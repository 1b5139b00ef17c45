#include "terminal.hpp"

#include "text.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <sys/ioctl.h>
#include <unistd.h>

namespace tool {

namespace {

size_t terminal_columns() {
    winsize size{};
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 10)
        return size.ws_col;
    return 80;
}

// A note that comes while a progress line stands there takes its place.
bool line_shown = false;

void clear_line() {
    if (!line_shown)
        return;
    std::fputs("\r\x1b[K", stderr);
    std::fflush(stderr);
    line_shown = false;
}

} // namespace

bool stderr_is_terminal() {
    const char *term = std::getenv("TERM");
    return isatty(STDERR_FILENO) && !(term && std::strcmp(term, "dumb") == 0);
}

bool stdout_has_colour() {
    const char *no_colour = std::getenv("NO_COLOR");
    const char *term = std::getenv("TERM");
    return isatty(STDOUT_FILENO) && !(no_colour && no_colour[0]) &&
           !(term && std::strcmp(term, "dumb") == 0);
}

void note(bool quiet, const std::string &message) {
    if (quiet)
        return;
    clear_line();
    std::fprintf(stderr, "ponder: %s\n", message.c_str());
}

Progress::Progress(bool quiet)
    : on_(!quiet && stderr_is_terminal()), next_(std::chrono::steady_clock::now()) {}

bool Progress::due() { return on_ && std::chrono::steady_clock::now() >= next_; }

void Progress::show(const std::string &line) {
    if (!on_)
        return;
    next_ = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
    std::string cut = line;
    const size_t columns = terminal_columns() - 1;
    while (display_width(cut) > columns)
        cut.pop_back();
    std::fprintf(stderr, "\r%s\x1b[K", cut.c_str());
    std::fflush(stderr);
    line_shown = true;
}

void Progress::clear() { clear_line(); }

std::string progress_bar(double share, int width) {
    const int full = int(std::lround(std::min(std::max(share, 0.0), 1.0) * width));
    std::string bar(size_t(width + 2), '.');
    bar.front() = '[';
    bar.back() = ']';
    std::fill_n(bar.begin() + 1, full, '#');
    return bar;
}

} // namespace tool
