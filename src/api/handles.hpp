// What the opaque handles hold.
#pragma once

#include "api/guard.hpp"
#include "base/options.hpp"
#include "session/model.hpp"
#include "session/session.hpp"
#include "train/trainer.hpp"

#include <atomic>

struct ponder_runtime : ponder::api::Tagged<0x506f5254> {
    std::shared_ptr<const ponder::Runtime> runtime;
};

struct ponder_model : ponder::api::Tagged<0x506f4d44> {
    mutable std::atomic<uint32_t> owners{1};
    std::shared_ptr<const ponder::Model> model;
};

struct ponder_options : ponder::api::Tagged<0x506f4f50> {
    ponder::Options options;
};

struct ponder_session : ponder::api::Tagged<0x506f5353> {
    std::unique_ptr<ponder::Session> session;
};

struct ponder_trainer : ponder::api::Tagged<0x506f5472> {
    std::unique_ptr<ponder::Trainer> trainer;
};

namespace ponder::api {

// Where a function takes NULL.
inline Options options_or_defaults(const ponder_options *options) {
    return options ? check(options, "options").options : Options();
}

} // namespace ponder::api
