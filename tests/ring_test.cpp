// Sums over processes; threads stand for them, each with sockets of its own.
#include "base/error.hpp"
#include "base/ring.hpp"
#include "expect_error.hpp"
#include "free_port.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

namespace ponder::test {
namespace {

const auto no_check = [] {};

// What each process did: nothing or its error.
std::vector<std::string> run(uint32_t count, const std::function<void(uint32_t)> &process) {
    std::vector<std::string> errors(count);
    std::vector<std::thread> threads;
    for (uint32_t r = 0; r < count; ++r)
        threads.emplace_back([&, r] {
            try {
                process(r);
            } catch (const Error &error) {
                errors[r] = std::to_string(error.status()) + " " + error.what();
            }
        });
    for (std::thread &t : threads)
        t.join();
    return errors;
}

TEST(Ring, SumsAndGathers) {
    for (const uint32_t count : {2u, 3u, 5u}) {
        const std::string address = free_address();
        for (const size_t n : {size_t(0), size_t(1), size_t(7), size_t(300000)}) {
            std::vector<std::vector<float>> sums(count);
            std::vector<std::vector<std::vector<std::byte>>> blocks(count);
            const auto errors = run(count, [&](uint32_t r) {
                Ring ring({r, count, address, "job", 20}, no_check);
                sums[r].resize(n);
                for (size_t i = 0; i < n; ++i)
                    sums[r][i] = float(r + 1) * 0.1f + float(i % 1000);
                ring.sum(sums[r], no_check);
                blocks[r] = ring.gather(std::vector<std::byte>(n * r, std::byte(r)), no_check);
            });
            for (uint32_t r = 0; r < count; ++r) {
                EXPECT_EQ(errors[r], "");
                EXPECT_EQ(sums[r], sums[0]); // the same bits
                for (size_t i = 0; i < n; i += 1 + n / 50)
                    EXPECT_NEAR(sums[r][i],
                                0.05 * count * (count + 1) + double(count) * double(i % 1000),
                                1e-3);
                ASSERT_EQ(blocks[r].size(), count);
                for (uint32_t s = 0; s < count; ++s)
                    EXPECT_EQ(blocks[r][s], std::vector<std::byte>(n * s, std::byte(s)));
            }
        }
    }
}

TEST(Ring, WhoeverGoesIsMissed) {
    const std::string address = free_address();
    std::atomic<int> gone{0};
    const auto errors = run(3, [&](uint32_t r) {
        Ring ring({r, 3, address, "job", 20}, no_check);
        std::vector<float> values(100, 1.0f);
        ring.sum(values, no_check);
        if (r == 1) {
            ++gone;
            return;
        }
        while (gone == 0)
            std::this_thread::yield();
        for (int i = 0; i < 2; ++i) // and stays missed
            EXPECT_EQ(thrown_status([&] { ring.sum(values, no_check); }), PONDER_E_IO);
    });
    for (const std::string &error : errors)
        EXPECT_EQ(error, "");
}

TEST(Ring, WaitsForItsPort) {
    const std::string address = free_address();
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    at.sin_port = htons(uint16_t(std::stoi(address.substr(address.find(':') + 1))));
    ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr *>(&at), sizeof at), 0);
    EXPECT_EQ(thrown_status([&] { Ring({0, 2, address, "job", 0.2}, no_check); }), PONDER_E_IO);
    const auto errors = run(3, [&](uint32_t r) {
        if (r == 2) {
            std::this_thread::sleep_for(std::chrono::milliseconds(200));
            close(fd);
            return;
        }
        Ring ring({r, 2, address, "job", 20}, no_check);
    });
    for (const std::string &error : errors)
        EXPECT_EQ(error, "");
}

TEST(Ring, WaitingHasAnEnd) {
    for (const uint32_t rank : {0u, 1u}) {
        const auto start = std::chrono::steady_clock::now();
        EXPECT_EQ(thrown_status([&] {
                      Ring({rank, 2, free_address(), "job", 0.3}, no_check);
                  }),
                  PONDER_E_IO);
        EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
        int calls = 0;
        const auto cancel = [&] {
            if (++calls == 3)
                throw_error(PONDER_E_CANCELLED, "enough");
        };
        EXPECT_EQ(thrown_status([&] {
                      Ring({rank, 2, free_address(), "job", 60}, cancel);
                  }),
                  PONDER_E_CANCELLED);
    }
}

TEST(Ring, StrangersAreSentAwayAndOtherJobsRefused) {
    const std::string address = free_address();
    std::vector<std::string> errors = run(3, [&](uint32_t r) {
        if (r == 2) { // speaks another protocol, then goes
            const int fd = socket(AF_INET, SOCK_STREAM, 0);
            sockaddr_in at{};
            at.sin_family = AF_INET;
            at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
            at.sin_port = htons(uint16_t(std::stoi(address.substr(address.find(':') + 1))));
            while (connect(fd, reinterpret_cast<sockaddr *>(&at), sizeof at) != 0)
                std::this_thread::sleep_for(std::chrono::milliseconds(5));
            const std::string request(200, 'G');
            EXPECT_EQ(send(fd, request.data(), request.size(), MSG_NOSIGNAL), 200);
            close(fd);
            return;
        }
        if (r == 1)
            std::this_thread::sleep_for(std::chrono::milliseconds(200));
        Ring ring({r, 2, address, "job", 20}, no_check);
        std::vector<float> one(1, 1.0f);
        ring.sum(one, no_check);
        EXPECT_EQ(one[0], 2.0f);
    });
    for (const std::string &error : errors)
        EXPECT_EQ(error, "");

    const std::string other = free_address();
    errors = run(2, [&](uint32_t r) {
        Ring({r, 2, other, r == 0 ? "this" : "that", 20}, no_check);
    });
    for (const std::string &error : errors)
        EXPECT_TRUE(error.starts_with(std::to_string(PONDER_E_MISMATCH))) << error;
}

TEST(Ring, PlacesThatMakeNoSense) {
    for (const char *address : {"", "nowhere", ":80", "127.0.0.1:", "127.0.0.1:x", "[::1]"})
        EXPECT_EQ(thrown_status([&] {
                      Ring({0, 2, address, "job", 1}, no_check);
                  }),
                  PONDER_E_ARGUMENT)
            << address;
    EXPECT_EQ(thrown_status([&] {
                  Ring({2, 2, free_address(), "job", 1}, no_check);
              }),
              PONDER_E_ARGUMENT);
}

} // namespace
} // namespace ponder::test
