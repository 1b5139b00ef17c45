// How long a stream of documents will be, for policies that spend by it.
#pragma once

#include "documents.hpp"
#include "tokens.hpp"

namespace tool {

// Tells the session, if its policy wants to know. Only tokenising everything can say.
void declare_length(ponder_session *session, const std::string &policy, Documents &documents,
                    const DocumentTokens &tokens);

} // namespace tool
