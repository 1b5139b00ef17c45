// An address on this machine at which nothing listens.
#pragma once

#include <string>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

namespace ponder::test {

inline std::string free_address() {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof at;
    bind(fd, reinterpret_cast<sockaddr *>(&at), size);
    getsockname(fd, reinterpret_cast<sockaddr *>(&at), &size);
    close(fd);
    return "127.0.0.1:" + std::to_string(ntohs(at.sin_port));
}

} // namespace ponder::test
