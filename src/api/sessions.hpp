// Lists of sessions, as calls for several streams take them.
#pragma once

#include "api/handles.hpp"

#include <set>
#include <vector>

namespace ponder::api {

// Distinct live sessions of one model.
inline std::vector<Session *> session_list(ponder_session *const *sessions, uint32_t count) {
    if (count > 0)
        require(sessions, "sessions");
    std::vector<Session *> list;
    for (uint32_t i = 0; i < count; ++i) {
        list.push_back(check(sessions[i], "sessions[i]").session.get());
        if (&list[i]->model() != &list[0]->model())
            throw_error(PONDER_E_ARGUMENT, "sessions[%u] belongs to another model", i);
    }
    if (std::set<Session *>(list.begin(), list.end()).size() != list.size())
        throw_error(PONDER_E_ARGUMENT, "a session stands twice in the list");
    return list;
}

} // namespace ponder::api
