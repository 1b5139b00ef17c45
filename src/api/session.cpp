// Sessions: streams of one model.
#include "api/sessions.hpp"

#include "base/file.hpp"

using namespace ponder;
using namespace ponder::api;

namespace {

Session &session_of(ponder_session *handle, const char *name = "session") {
    return *check(handle, name).session;
}
const Session &session_of(const ponder_session *handle, const char *name = "session") {
    return *check(handle, name).session;
}

CallGuard guard_of(Session &session, const ponder_call &call) {
    return CallGuard(session.cancel_flag(), &call);
}
// Made before any session's turn: time counts from the call's start, and each can be cancelled.
std::vector<CallGuard> guards_of(const std::vector<Session *> &sessions, const ponder_call &call) {
    std::vector<CallGuard> guards;
    for (Session *session : sessions)
        guards.push_back(guard_of(*session, call));
    return guards;
}

} // namespace

ponder_status ponder_session_create(ponder_session **out, const ponder_model *model,
                                    const ponder_options *options, ponder_error *error) {
    return guard(error, [&] {
        require(out, "out");
        const auto &m = check(model, "model").model;
        const Options o = options_or_defaults(options);
        auto handle = std::make_unique<ponder_session>();
        handle->session = std::make_unique<Session>(m, o);
        *out = handle.release();
    });
}

void ponder_session_destroy(ponder_session *session) {
    if (session && ponder_session::is(session))
        delete session;
}

ponder_status ponder_session_reset(ponder_session *session, ponder_error *error) {
    return guard(error, [&] { session_of(session).reset(); });
}

ponder_status ponder_session_fork(ponder_session **out, const ponder_session *session,
                                  ponder_error *error) {
    return guard(error, [&] {
        require(out, "out");
        auto handle = std::make_unique<ponder_session>();
        handle->session = session_of(session).fork();
        *out = handle.release();
    });
}

ponder_status ponder_session_expect(ponder_session *session, uint64_t chunks, ponder_error *error) {
    return guard(error, [&] { session_of(session).expect(chunks); });
}

ponder_status ponder_session_feed(ponder_session *session, const int32_t *ids, size_t count,
                                  ponder_error *error) {
    return guard(error, [&] {
        Session &s = session_of(session);
        if (count > 0)
            s.feed({&require(ids, "ids"), count});
    });
}

ponder_status ponder_session_get(const ponder_session *session, ponder_session_info *out,
                                 ponder_error *error) {
    return guard(error, [&] {
        const Session &s = session_of(session);
        check_out(out, "out");
        write_struct(out, s.info());
    });
}

ponder_status ponder_score(ponder_session *const *sessions, uint32_t count, uint8_t *done,
                           const ponder_call *call, ponder_error *error) {
    return guard(error, [&] {
        const ponder_call limits = read_struct(call, "call");
        const std::vector<Session *> list = session_list(sessions, count);
        for (size_t i = 0; i < list.size(); ++i)
            if (list[i]->has_open())
                throw_error(PONDER_E_STATE,
                            "sessions[%zu]: the last scored chunk has not been "
                            "learned",
                            i);
        const std::vector<CallGuard> guards = guards_of(list, limits);
        for (size_t i = 0; i < list.size(); ++i) {
            const bool scored = list[i]->score(guards[i]);
            if (done)
                done[i] = scored;
        }
    });
}

ponder_status ponder_learn(ponder_session *const *sessions, uint32_t count, const int32_t *steps,
                           const ponder_call *call, ponder_error *error) {
    return guard(error, [&] {
        const ponder_call limits = read_struct(call, "call");
        const std::vector<Session *> list = session_list(sessions, count);
        for (uint32_t i = 0; steps && i < count; ++i)
            if (steps[i] < 0 || steps[i] > 64)
                throw_error(PONDER_E_ARGUMENT, "steps[%u] = %d is not in 0..64", i, steps[i]);
        for (size_t i = 0; steps && i < list.size(); ++i)
            list[i]->require_steps(steps[i]);
        const std::vector<CallGuard> guards = guards_of(list, limits);
        for (size_t i = 0; i < list.size(); ++i)
            list[i]->learn(steps ? steps[i] : -1, guards[i]);
    });
}

ponder_status ponder_session_adapt(ponder_session *session, const int32_t *ids, size_t count,
                                   const ponder_call *call, ponder_error *error) {
    return guard(error, [&] {
        Session &s = session_of(session);
        const ponder_call limits = read_struct(call, "call");
        const CallGuard bounds = guard_of(s, limits);
        s.require_length();
        if (count > 0)
            s.feed({&require(ids, "ids"), count});
        s.adapt(bounds);
    });
}

ponder_status ponder_session_flush(ponder_session *session, const ponder_call *call,
                                   ponder_error *error) {
    return guard(error, [&] {
        Session &s = session_of(session);
        const ponder_call limits = read_struct(call, "call");
        s.flush(guard_of(s, limits));
    });
}

ponder_status ponder_session_losses(const ponder_session *session, float *nll, size_t capacity,
                                    size_t *count, ponder_error *error) {
    return guard(error, [&] {
        const std::span<const float> losses = session_of(session).losses();
        require(count, "count") = losses.size();
        if (losses.size() > capacity)
            throw_error(PONDER_E_BUFFER, "%zu losses, capacity %zu", losses.size(), capacity);
        std::copy(losses.begin(), losses.end(), &require(nll, "nll"));
    });
}

ponder_status ponder_session_records(const ponder_session *session, uint64_t chunk,
                                     ponder_record *records, size_t capacity, size_t *count,
                                     ponder_error *error) {
    return guard(error, [&] {
        const Session &s = session_of(session);
        require(count, "count");
        if (capacity > 0)
            check_out(records, "records");
        // The caller's struct may be smaller or larger than ours: its size is the stride.
        const size_t stride = capacity > 0 ? records->struct_size : 0;
        auto *bytes = reinterpret_cast<unsigned char *>(records);
        size_t written = 0;
        for (const ponder_record &record : s.records()) {
            if (record.chunk < chunk || written == capacity)
                continue;
            unsigned char *at = bytes + written++ * stride;
            std::memset(at, 0, stride);
            std::memcpy(at, &record, std::min(stride, sizeof record));
            const uint32_t size = uint32_t(stride);
            std::memcpy(at, &size, sizeof size);
        }
        *count = written;
    });
}

void ponder_session_cancel(const ponder_session *session) {
    if (session && ponder_session::is(session))
        session->session->cancel();
}

ponder_status ponder_session_save(const ponder_session *session, const char *path,
                                  ponder_error *error) {
    return guard(error, [&] {
        const Session &s = session_of(session);
        require(path, "path");
        const std::vector<std::byte> snapshot = s.save();
        // Traces of what was read are its owner's alone.
        replace_file(
            path, [&](const Sink &sink) { sink(snapshot.data(), snapshot.size()); }, 0600);
    });
}

ponder_status ponder_session_load(ponder_session *session, const char *path, ponder_error *error) {
    return guard(error, [&] {
        Session &s = session_of(session);
        require(path, "path");
        s.load(SafeTensors::open(path));
    });
}

ponder_status ponder_session_save_memory(const ponder_session *session, void *data, size_t capacity,
                                         size_t *size, ponder_error *error) {
    return guard(error, [&] {
        const Session &s = session_of(session);
        require(size, "size");
        const std::vector<std::byte> snapshot = s.save();
        *size = snapshot.size();
        if (snapshot.size() > capacity)
            throw_error(PONDER_E_BUFFER, "%zu bytes, capacity %zu", snapshot.size(), capacity);
        std::memcpy(&require(static_cast<std::byte *>(data), "data"), snapshot.data(),
                    snapshot.size());
    });
}

ponder_status ponder_session_load_memory(ponder_session *session, const void *data, size_t size,
                                         ponder_error *error) {
    return guard(error, [&] {
        Session &s = session_of(session);
        require(static_cast<const std::byte *>(data), "data");
        s.load({static_cast<const std::byte *>(data), size}, "snapshot in memory");
    });
}

ponder_status ponder_session_profile(ponder_session *session, uint32_t repeat,
                                     ponder_profile_entry *entries, size_t capacity, size_t *count,
                                     ponder_error *error) {
    return guard(error, [&] {
        Session &s = session_of(session);
        require(count, "count");
        if (repeat < 1 || repeat > 1000000)
            throw_error(PONDER_E_ARGUMENT, "repeat %u is not in 1..1000000", repeat);
        const CallGuard bounds(s.cancel_flag(), nullptr);
        std::vector<ponder_profile_entry> found;
        for (const Segment segment : {score_segment, learn_segment})
            for (const CallTime &time : s.profile(segment, repeat, bounds)) {
                ponder_profile_entry entry{};
                entry.struct_size = sizeof entry;
                entry.calls = time.calls / repeat;
                entry.op = time.op;
                entry.backend = time.backend;
                entry.where = segment == score_segment ? "score" : "learn";
                entry.flops = time.flops / repeat;
                entry.ns = time.ns / repeat;
                found.push_back(entry);
            }
        *count = found.size();
        if (found.size() > capacity)
            throw_error(PONDER_E_BUFFER, "%zu entries, capacity %zu", found.size(), capacity);
        std::copy(found.begin(), found.end(), &require(entries, "entries"));
    });
}
