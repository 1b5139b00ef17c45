#include "base/ring.hpp"

#include "base/error.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace ponder {

namespace {

using Clock = std::chrono::steady_clock;
using Check = std::function<void()>;

constexpr int tick_ms = 50;                    // how often `check` is called while nothing comes
constexpr uint64_t magic = 0x3130676e69722d70; // also says whether bytes have the same order
constexpr uint64_t longest_block = uint64_t(1) << 32;

class Socket {
public:
    explicit Socket(int fd = -1) : fd_(fd) {}
    Socket(Socket &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Socket &operator=(Socket &&other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Socket() {
        if (fd_ >= 0)
            ::close(fd_);
    }
    int get() const { return fd_; }
    int release() { return std::exchange(fd_, -1); }

private:
    int fd_;
};

[[noreturn]] void fail(const char *what, int problem) {
    throw_error(PONDER_E_IO, "train.address: %s: %s", what, std::strerror(problem));
}

// Time without progress.
class Patience {
public:
    explicit Patience(double seconds) : seconds_(seconds) {}
    void renew() { since_ = Clock::now(); }
    bool over() const {
        return std::chrono::duration<double>(Clock::now() - since_).count() > seconds_;
    }

private:
    double seconds_;
    Clock::time_point since_ = Clock::now();
};

void set_up(int fd) {
    const int yes = 1;
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

// False: not yet. -1 from the calls below with anything else is the connection's end.
bool later() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

struct Transfer {
    int fd;
    bool receives;
    std::byte *at;
    size_t left;

    // 1: something moved. 0: not yet. -1: the connection has ended.
    int move() {
        const size_t most = std::min(left, size_t(1) << 20);
        const ssize_t n = receives ? recv(fd, at, most, 0) : send(fd, at, most, MSG_NOSIGNAL);
        if (n < 0 && later())
            return 0;
        if (n <= 0)
            return -1;
        at += n;
        left -= size_t(n);
        return 1;
    }
};

// Until all transfers are through. False: a connection has ended, or patience has.
bool move_all(std::span<Transfer> transfers, double seconds, const Check &check) {
    Patience patience(seconds);
    for (;;) {
        pollfd wait[2];
        nfds_t n = 0;
        bool moved = false;
        for (Transfer &t : transfers) {
            if (t.left == 0)
                continue;
            const int result = t.move();
            if (result < 0)
                return false;
            moved = moved || result > 0;
            if (t.left > 0)
                wait[n++] = {t.fd, short(t.receives ? POLLIN : POLLOUT), 0};
        }
        if (n == 0)
            return true;
        check();
        if (moved)
            patience.renew();
        else if (poll(wait, n, tick_ms) == 0 && patience.over())
            return false;
    }
}

bool send_all(int fd, const void *data, size_t size, double seconds, const Check &check) {
    Transfer t{fd, false, static_cast<std::byte *>(const_cast<void *>(data)), size};
    return move_all({&t, 1}, seconds, check);
}
bool receive_all(int fd, void *data, size_t size, double seconds, const Check &check) {
    Transfer t{fd, true, static_cast<std::byte *>(data), size};
    return move_all({&t, 1}, seconds, check);
}

struct Address {
    sockaddr_storage at{};
    uint32_t size = 0;

    const sockaddr *get() const { return reinterpret_cast<const sockaddr *>(&at); }
    sockaddr *get() { return reinterpret_cast<sockaddr *>(&at); }
    void set_port(uint16_t port) {
        if (at.ss_family == AF_INET6)
            reinterpret_cast<sockaddr_in6 *>(&at)->sin6_port = htons(port);
        else
            reinterpret_cast<sockaddr_in *>(&at)->sin_port = htons(port);
    }
    uint16_t port() const {
        return ntohs(at.ss_family == AF_INET6
                         ? reinterpret_cast<const sockaddr_in6 *>(&at)->sin6_port
                         : reinterpret_cast<const sockaddr_in *>(&at)->sin_port);
    }
};

Address parse_address(const std::string &text) {
    const size_t colon = text.rfind(':');
    if (colon == std::string::npos || colon == 0 || colon + 1 == text.size())
        throw_error(PONDER_E_ARGUMENT, "option 'train.address': '%.200s' is not HOST:PORT",
                    text.c_str());
    std::string host = text.substr(0, colon);
    if (host.size() > 2 && host.front() == '[' && host.back() == ']')
        host = host.substr(1, host.size() - 2);
    addrinfo hints{}, *found = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV;
    const int problem = getaddrinfo(host.c_str(), text.c_str() + colon + 1, &hints, &found);
    if (problem != 0)
        throw_error(PONDER_E_ARGUMENT, "option 'train.address': '%.200s': %s", text.c_str(),
                    gai_strerror(problem));
    Address address;
    address.size = uint32_t(found->ai_addrlen);
    std::memcpy(&address.at, found->ai_addr, found->ai_addrlen);
    freeaddrinfo(found);
    return address;
}

// At the address, or with port 0 at any free port of its family on every interface. A port that
// ended connections hold is free again within a minute.
Socket listen_at(Address &address, bool anywhere, double seconds, const Check &check) {
    if (anywhere) {
        const auto family = address.at.ss_family;
        address.at = {}; // the unspecified address of both families is all zeros
        address.at.ss_family = family;
    }
    Socket socket(::socket(address.at.ss_family, SOCK_STREAM, 0));
    if (socket.get() < 0)
        fail("socket", errno);
    const int yes = 1;
    setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    const Patience patience(seconds);
    while (bind(socket.get(), address.get(), address.size) != 0) {
        const int problem = errno;
        if (problem != EADDRINUSE || patience.over())
            fail("bind", problem);
        check();
        poll(nullptr, 0, tick_ms);
    }
    if (listen(socket.get(), 128) != 0)
        fail("listen", errno);
    set_up(socket.get());
    socklen_t size = sizeof address.at;
    getsockname(socket.get(), address.get(), &size);
    return socket;
}

// -1 and no exception: nobody came for a tick.
Socket accept_one(int listener, Address &from) {
    pollfd wait{listener, POLLIN, 0};
    if (poll(&wait, 1, tick_ms) <= 0)
        return Socket();
    socklen_t size = sizeof from.at;
    Socket socket(accept(listener, from.get(), &size));
    from.size = uint32_t(size);
    if (socket.get() >= 0)
        set_up(socket.get());
    return socket;
}

// While nobody listens at a port of this machine, one in thousands of tries to connect to it is
// given that port as its own and reaches itself.
bool reached_itself(int fd) {
    Address own, other;
    socklen_t own_size = sizeof own.at, other_size = sizeof other.at;
    return getsockname(fd, own.get(), &own_size) == 0 &&
           getpeername(fd, other.get(), &other_size) == 0 && own_size == other_size &&
           std::memcmp(&own.at, &other.at, own_size) == 0;
}

// Tries again while nobody listens there yet.
Socket connect_to(const Address &address, double seconds, const Check &check) {
    const Patience patience(seconds);
    for (int problem = 0;; check()) {
        Socket socket(::socket(address.at.ss_family, SOCK_STREAM, 0));
        if (socket.get() < 0)
            fail("socket", errno);
        set_up(socket.get());
        problem = connect(socket.get(), address.get(), address.size) == 0 ? 0 : errno;
        if (problem == EINPROGRESS) {
            pollfd wait{socket.get(), POLLOUT, 0};
            socklen_t size = sizeof problem;
            if (poll(&wait, 1, 1000) == 1)
                getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &problem, &size);
        }
        if (problem == 0) {
            if (!reached_itself(socket.get()))
                return socket;
            problem = ECONNREFUSED;
        }
        if (patience.over())
            fail("connect", problem);
        poll(nullptr, 0, tick_ms);
    }
}

// What a process says of itself; fixed size, so that nothing foreign is ever waited for long.
struct Hello {
    uint64_t magic;
    uint32_t rank, count;
    uint32_t port; // at which it waits for the process before it
    char job[68];
};

Hello hello_of(const Ring::Place &place, uint16_t port) {
    Hello hello{magic, place.rank, place.count, port, {}};
    std::strncpy(hello.job, place.job.c_str(), sizeof hello.job - 1);
    return hello;
}

struct Reply {
    uint32_t accepted;
    Address next;
};

} // namespace

Ring::Ring(const Place &place, const Check &check)
    : rank_(place.rank), count_(place.count), patience_(place.patience) {
    if (place.count < 2 || place.rank >= place.count)
        throw_error(PONDER_E_ARGUMENT, "option 'train.rank': %u of %u processes", place.rank,
                    place.count);
    Address address = parse_address(place.address);
    const auto agree = [&](const Hello &h) {
        return h.count == count_ && place.job.compare(0, sizeof h.job - 1, h.job) == 0;
    };
    const Patience patience(patience_);
    const auto wait_for = [&](int listener, auto &&take) { // until `take` has all it wants
        for (bool done = false; !done;) {
            check();
            if (patience.over())
                throw_error(PONDER_E_IO, "train.address: process %u of %u waited %.0f s in vain",
                            rank_, count_, patience_);
            Address from;
            Socket socket = accept_one(listener, from);
            Hello hello{};
            // What does not speak like one of us is sent away.
            if (socket.get() >= 0 && receive_all(socket.get(), &hello, sizeof hello, 5, check) &&
                hello.magic == magic) {
                hello.job[sizeof hello.job - 1] = 0;
                done = take(std::move(socket), from, hello);
            }
        }
    };

    if (rank_ > 0) {
        Socket first = connect_to(address, patience_, check), next, previous;
        Address own = address;
        own.set_port(0);
        const Socket listener = listen_at(own, true, 0, check);
        const Hello hello = hello_of(place, own.port());
        Reply reply{};
        if (!send_all(first.get(), &hello, sizeof hello, patience_, check) ||
            !receive_all(first.get(), &reply, sizeof reply, patience_, check))
            throw_error(PONDER_E_IO, "train.address: process 0 did not answer process %u", rank_);
        if (!reply.accepted)
            throw_error(PONDER_E_MISMATCH,
                        "train.address: process 0 has another job or number of "
                        "processes than process %u",
                        rank_);
        if (rank_ + 1 == count_) {
            next = std::move(first); // the ring closes over the connection that is there
        } else {
            next = connect_to(reply.next, patience_, check);
            if (!send_all(next.get(), &hello, sizeof hello, patience_, check))
                throw_error(PONDER_E_IO, "train.address: process %u did not take process %u",
                            rank_ + 1, rank_);
        }
        wait_for(listener.get(), [&](Socket socket, const Address &, const Hello &h) {
            if (!agree(h) || h.rank != rank_ - 1)
                return false;
            previous = std::move(socket);
            return true;
        });
        next_ = next.release();
        previous_ = previous.release();
        return;
    }

    const Socket listener = listen_at(address, false, std::min(patience_, 70.0), check);
    std::vector<Socket> sockets(count_);
    std::vector<Address> places(count_);
    uint32_t here = 1;
    wait_for(listener.get(), [&](Socket socket, const Address &from, const Hello &h) {
        if (!agree(h) || h.rank == 0 || h.rank >= count_ || sockets[h.rank].get() >= 0) {
            const Reply refused{};
            send_all(socket.get(), &refused, sizeof refused, 5, check);
            throw_error(PONDER_E_MISMATCH,
                        "train.address: a process that calls itself %u of %u came to process 0 of "
                        "%u%s",
                        h.rank, h.count, count_, agree(h) ? "" : ", with another job");
        }
        places[h.rank] = from;
        places[h.rank].set_port(uint16_t(h.port));
        sockets[h.rank] = std::move(socket);
        return ++here == count_;
    });
    for (uint32_t r = 1; r < count_; ++r) {
        const Reply reply{1, r + 1 < count_ ? places[r + 1] : Address()};
        if (!send_all(sockets[r].get(), &reply, sizeof reply, patience_, check))
            throw_error(PONDER_E_IO, "train.address: process %u has gone", r);
    }
    Socket next = connect_to(places[1], patience_, check);
    const Hello hello = hello_of(place, 0);
    if (!send_all(next.get(), &hello, sizeof hello, patience_, check))
        throw_error(PONDER_E_IO, "train.address: process 1 has gone");
    next_ = next.release();
    previous_ = sockets[count_ - 1].release();
}

Ring::~Ring() {
    for (const int fd : {next_, previous_})
        if (fd >= 0)
            ::close(fd);
}

void Ring::exchange(std::span<const std::byte> out, std::span<std::byte> in, const Check &check) {
    if (broken_)
        throw_error(PONDER_E_IO, "the processes that train together have parted");
    broken_ = true; // unless all goes well
    Transfer both[] = {{next_, false, const_cast<std::byte *>(out.data()), out.size()},
                       {previous_, true, in.data(), in.size()}};
    if (!move_all(both, patience_, check))
        throw_error(
            PONDER_E_IO,
            "process %u of %u lost its neighbours: one has gone, or nothing came for %.0f s", rank_,
            count_, patience_);
    broken_ = false;
}

std::vector<std::vector<std::byte>> Ring::gather(std::span<const std::byte> own,
                                                 const Check &check) {
    std::vector<std::vector<std::byte>> all(count_);
    all[rank_].assign(own.begin(), own.end());
    for (uint32_t step = 0; step + 1 < count_; ++step) {
        const std::vector<std::byte> &out = all[(rank_ + count_ - step) % count_];
        std::vector<std::byte> &in = all[(rank_ + count_ - step - 1) % count_];
        const uint64_t size = out.size();
        uint64_t coming = 0;
        exchange(std::as_bytes(std::span(&size, 1)), std::as_writable_bytes(std::span(&coming, 1)),
                 check);
        if (coming > longest_block) {
            broken_ = true;
            throw_error(PONDER_E_IO, "process %u of %u is sent nonsense", rank_, count_);
        }
        in.resize(size_t(coming));
        exchange(out, in, check);
    }
    return all;
}

// Each part of the vector is summed once while it travels around the ring, and then handed around.
// (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations")
void Ring::sum(std::span<float> values, const Check &check) {
    const auto part = [&](uint32_t i) {
        i %= count_;
        const size_t begin = values.size() * i / count_, end = values.size() * (i + 1) / count_;
        return values.subspan(begin, end - begin);
    };
    std::vector<float> incoming(values.size() / count_ + 1);
    for (uint32_t step = 0; step + 1 < count_; ++step) {
        const std::span<float> out = part(rank_ + count_ - step);
        const std::span<float> to = part(rank_ + 2 * count_ - step - 1);
        const std::span<float> in = std::span(incoming).first(to.size());
        exchange(std::as_bytes(out), std::as_writable_bytes(in), check);
        for (size_t i = 0; i < in.size(); ++i)
            to[i] += in[i];
    }
    for (uint32_t step = 0; step + 1 < count_; ++step) {
        const std::span<float> out = part(rank_ + 1 + count_ - step);
        const std::span<float> in = part(rank_ + 2 * count_ - step);
        exchange(std::as_bytes(out), std::as_writable_bytes(in), check);
    }
}

} // namespace ponder
