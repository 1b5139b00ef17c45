// Documents -> token ids: the end-of-text id, then the document's tokens.
#pragma once

#include "common.hpp"

#include <string_view>
#include <vector>

namespace tool {

class DocumentTokens {
public:
    explicit DocumentTokens(const ponder_model *model)
        : model_(model), end_of_text_(info_of(model).end_of_text) {
        if (!info_of(model).has_tokenizer)
            throw Failure(exit_file, "the model's folder has no tokenizer");
    }
    // Appends; returns how many.
    size_t append(std::string_view text, std::vector<int32_t> &to) const {
        const size_t before = to.size();
        if (end_of_text_ >= 0)
            to.push_back(end_of_text_);
        append_part(text, to);
        return to.size() - before;
    }
    // The text alone: it goes on with a document.
    void append_part(std::string_view text, std::vector<int32_t> &to) const {
        const size_t start = to.size();
        to.resize(start + text.size()); // a token has a byte at least
        size_t count = 0;
        call(ponder_model_tokenize, model_, text.data(), text.size(), to.data() + start,
             text.size(), &count);
        to.resize(start + count);
    }

private:
    const ponder_model *model_;
    int32_t end_of_text_;
};

} // namespace tool
