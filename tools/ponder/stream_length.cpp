#include "stream_length.hpp"

#include "interrupt.hpp"

namespace tool {

void declare_length(ponder_session *session, const std::string &policy, Documents &documents,
                    const DocumentTokens &tokens) {
    if (!policy.starts_with("first:") && policy != "adapter")
        return;
    const size_t chunk = info_of(session).chunk_tokens;
    documents.keep_standard_input();
    uint64_t count = 0;
    std::string path, text;
    std::vector<int32_t> ids;
    while (!interrupted() && documents.next(path, text)) {
        ids.clear();
        count += tokens.append(text, ids);
    }
    documents.rewind();
    call(ponder_session_expect, session, count / chunk + (count % chunk >= 2));
}

} // namespace tool
