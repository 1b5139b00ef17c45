// Cuts text into words by the GPT-2 pattern; merging never crosses a word's edge.
// Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (pattern).
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace ponder {

// The compiled pattern. Immutable after construction; any number of threads may split by it.
class WordSplitter {
public:
    WordSplitter();
    ~WordSplitter();
    WordSplitter(const WordSplitter &) = delete;
    WordSplitter &operator=(const WordSplitter &) = delete;

private:
    friend class Words;
    struct Pattern;
    std::unique_ptr<Pattern> pattern_;
};

// One pass over a text, which must outlive it. A byte that is no UTF-8 counts as a character
// that is no letter, number or space, like the control character U+0001. Time is linear.
class Words {
public:
    Words(const WordSplitter &splitter, std::string_view text);
    ~Words();
    Words(const Words &) = delete;
    Words &operator=(const Words &) = delete;

    // The next word into `word`; false at the end of the text. The words' concatenation is the
    // text. Throws when PCRE2 runs out of memory or hits a limit, never cuts wrongly.
    bool next(std::string_view &word);

private:
    struct Matcher;
    const WordSplitter &splitter_;
    std::unique_ptr<Matcher> matcher_;
    std::string_view text_;
    std::string_view subject_; // text_, or clean_ where that is no UTF-8
    std::string clean_;
    size_t position_ = 0;
};

} // namespace ponder
