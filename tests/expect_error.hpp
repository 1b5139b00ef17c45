// Expects a ponder::Error with a status and a one-line message that names the given things.
#pragma once

#include "base/error.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

template <class Call>
void expect_error(ponder_status status, const std::vector<std::string> &named, Call &&call) {
    try {
        call();
        ADD_FAILURE() << "no error, expected status " << status;
    } catch (const ponder::Error &error) {
        std::string message = error.what();
        EXPECT_EQ(error.status(), status) << message;
        for (const std::string &part : named)
            EXPECT_NE(message.find(part), message.npos) << "\"" << part << "\" not in: " << message;
        EXPECT_TRUE(std::none_of(message.begin(), message.end(), [](char c) {
            return c >= 0 && c < ' ';
        })) << message;
    }
}

// PONDER_OK where nothing is thrown.
template <class Call> ponder_status thrown_status(Call &&call) {
    try {
        call();
    } catch (const ponder::Error &error) {
        return error.status();
    }
    return PONDER_OK;
}
