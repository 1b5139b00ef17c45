// The packages of a stream file, tokenised one after the other.
#pragma once

#include "interrupt.hpp"
#include "json_in.hpp"
#include "source.hpp"
#include "tokens.hpp"

namespace tool {

// Reads one package after the other; holds the tokens of one.
class Packages {
public:
    Packages(const std::string &path, const ponder_model *model, uint64_t most_tokens)
        : lines_(path), tokens_(model), most_(most_tokens) {
        more_ = read();
    }
    bool next(std::string &name, std::vector<int32_t> &ids) {
        if (!more_)
            return false;
        name = *document_.package;
        ids.clear();
        do {
            // What comes after the last chunk that counts is read, but not tokenised.
            if (ids.size() < most_)
                tokens_.append(document_.text, ids);
            more_ = read();
        } while (more_ && document_.package == name && !interrupted());
        return true;
    }
    double share() const { return lines_.share(); }

private:
    bool read() {
        std::string line;
        while (lines_.next(line)) {
            if (line.find_first_not_of(" \t") == std::string::npos)
                continue;
            try {
                document_ = parse_document(line);
            } catch (const std::exception &error) {
                throw Failure(exit_file, lines_.place() + ": " + error.what());
            }
            return true;
        }
        return false;
    }

    LineReader lines_;
    DocumentTokens tokens_;
    uint64_t most_;
    Document document_;
    bool more_;
};

} // namespace tool
