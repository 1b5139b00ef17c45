// The page of `ponder run --html`: one file, no network, readable without its script.
#include "html_charts.hpp"
#include "html_page.hpp"
#include "run_result.hpp"
#include "setup.hpp"
#include "text.hpp"

#include <algorithm>

namespace tool {

namespace {

// Tokens shown from each end; about 65 bytes of page each.
constexpr size_t first_tokens = 36'000, last_tokens = 18'000;

// What would be invisible, or would change how the text around it is shown, becomes a symbol.
std::string symbol(uint32_t code) {
    if (code < 0x20)
        return format("<u>&#x%x;</u>", 0x2400 + code);
    if (code == 0x7f)
        return "<u>&#x2421;</u>";
    const bool hidden = (code >= 0x80 && code < 0xa0) || code == 0xad || code == 0x061c ||
                        (code >= 0x200b && code <= 0x200f) || (code >= 0x2028 && code <= 0x202e) ||
                        (code >= 0x2060 && code <= 0x206f) || code == 0xfeff ||
                        (code >= 0xe0000 && code <= 0xe0fff);
    return hidden ? format("<u>U+%04X</u>", unsigned(code)) : "";
}

uint32_t decode(std::string_view sequence) {
    const auto at = [&](size_t i) { return uint32_t(static_cast<unsigned char>(sequence[i])); };
    switch (sequence.size()) {
    case 1:
        return at(0);
    case 2:
        return (at(0) & 0x1f) << 6 | (at(1) & 0x3f);
    case 3:
        return (at(0) & 0x0f) << 12 | (at(1) & 0x3f) << 6 | (at(2) & 0x3f);
    default:
        return (at(0) & 0x07) << 18 | (at(1) & 0x3f) << 12 | (at(2) & 0x3f) << 6 | (at(3) & 0x3f);
    }
}

std::string character(std::string_view sequence) {
    if (sequence == "\n")
        return "<u>&#x21b5;</u>\n";
    if (sequence == "\t")
        return "\t";
    const std::string mark = symbol(decode(sequence));
    return mark.empty() ? html_escape(sequence) : mark;
}

// Shows text token by token. A character whose bytes are spread over several tokens stands in
// the first of them; the others get a dot.
class VisibleText {
public:
    explicit VisibleText(std::string text) : text_(std::move(text)) {}
    std::string take(size_t bytes) { // the next token's
        begin_ += bytes;
        std::string html;
        for (; at_ < begin_;) {
            const std::string_view rest = std::string_view(text_).substr(at_);
            const size_t size = utf8_sequence(rest);
            html += size > 0
                        ? character(rest.substr(0, size))
                        : format("<u>\\x%02x</u>", unsigned(static_cast<unsigned char>(rest[0])));
            at_ += size > 0 ? size : 1;
        }
        return html.empty() ? "<u>&middot;</u>" : html;
    }

private:
    std::string text_;
    size_t begin_ = 0; // of the token after the one that was taken last
    size_t at_ = 0;    // what has been shown; beyond begin_ inside a spread character
};

std::string visible(const std::string &text) { return VisibleText(text).take(text.size()); }

// Class of a token by how much easier it became, in nats.
const char *shade(double gain) {
    const double size = std::abs(gain);
    const int level = size < 0.1 ? 0 : size < 0.5 ? 1 : size < 1.5 ? 2 : size < 3 ? 3 : 4;
    const char *const easier[] = {"", "e1", "e2", "e3", "e4"};
    const char *const harder[] = {"", "h1", "h2", "h3", "h4"};
    return std::isnan(gain) ? "" : gain >= 0 ? easier[level] : harder[level];
}

std::string_view token_bytes(const ponder_model *model, int32_t id) {
    const char *bytes = nullptr;
    size_t size = 0;
    call(ponder_model_token_bytes, model, id, &bytes, &size);
    return {bytes, size};
}

std::string token_html(const RunResult &run, size_t position, const std::string &text) {
    const double adapted = run.losses[position];
    const double skip = position < run.skip_losses.size() ? run.skip_losses[position] : NAN;
    std::string html = "<i";
    const std::string style = shade(skip - adapted);
    if (!style.empty())
        html += " class=" + style;
    if (!std::isnan(adapted))
        html += std::isnan(skip) ? format(" data-l=\"- %.2f\"", adapted)
                                 : format(" data-l=\"%.2f %.2f\"", skip, adapted);
    return html + ">" + text + "</i>";
}

std::string difference(double gain) {
    if (std::abs(gain) < 0.0005)
        return "the same";
    return format("%.3f %s", std::abs(gain), gain > 0 ? "easier" : "harder");
}

std::string chunk_html(const RunResult &run, const ponder_model *model, size_t index,
                       size_t &document) {
    const RunChunk &chunk = run.chunks[index];
    const ponder_record &r = chunk.record;
    std::string html = format("<div class=chunk>chunk <b>%llu</b> &middot; loss <b>%.3f</b>",
                              (unsigned long long)r.chunk, r.loss_before);
    if (std::isfinite(chunk.skip_loss))
        html += format(" &middot; SKIP %.3f &middot; ", chunk.skip_loss) +
                difference(chunk.skip_loss - r.loss_before);
    html += format(" &middot; K = %d</div><pre tabindex=0 aria-label=\"chunk %llu\">", int(r.steps),
                   (unsigned long long)r.chunk);
    const size_t end = size_t(r.first_token + r.tokens);
    std::string bytes;
    for (size_t t = size_t(r.first_token); t < end; ++t)
        bytes += token_bytes(model, run.tokens[t]);
    VisibleText text(std::move(bytes));
    while (document < run.documents.size() && run.documents[document].token < r.first_token)
        ++document;
    for (size_t t = size_t(r.first_token); t < end; ++t) {
        for (; document < run.documents.size() && run.documents[document].token == t; ++document)
            html += "<span class=file>" + visible(run.documents[document].path) + "</span> ";
        html += token_html(run, t, text.take(token_bytes(model, run.tokens[t]).size()));
    }
    return html + "</pre>\n";
}

std::string tokens_html(const RunResult &run, const ponder_model *model) {
    std::string html = "<h2>Tokens</h2>\n";
    if (run.has_skip())
        html += "<p>Coloured by how much easier each became: its loss under SKIP minus its loss "
                "when adapted, in nats.</p><div class=key>"
                "<span><span class='sw e4'></span><span class='sw e3'></span>"
                "<span class='sw e2'></span><span class='sw e1'></span> easier by 3, 1.5, 0.5, 0.1 "
                "or more</span><span><span class='sw h1'></span><span class='sw h2'></span>"
                "<span class='sw h3'></span><span class='sw h4'></span> harder by 0.1, 0.5, 1.5, 3 "
                "or more</span></div>";
    else
        html += "<p>There was no SKIP pass (--no-baseline), so nothing is coloured.</p>";
    html += "<p class=soft>Point at a token for its losses, or focus a chunk and use the left and "
            "right arrow keys.</p>\n";
    size_t document = 0, left_out = 0;
    bool gap = false;
    for (size_t i = 0; i < run.chunks.size(); ++i) {
        const ponder_record &r = run.chunks[i].record;
        const uint64_t end = r.first_token + r.tokens;
        const bool shown =
            end <= run.tokens.size() &&
            (end <= first_tokens || r.first_token + last_tokens >= run.adapted.tokens);
        if (!shown) {
            left_out += 1;
            continue;
        }
        if (left_out > 0 && !gap) {
            html += format("<p class=soft>%zu chunks are not shown here.</p>\n", left_out);
            gap = true;
        }
        html += chunk_html(run, model, i, document);
    }
    if (left_out > 0 && !gap)
        html += format("<p class=soft>%zu more chunks are not shown.</p>\n", left_out);
    return html;
}

std::string card(const char *what, const std::string &value, const std::string &detail,
                 const char *style = "") {
    return format(
        "<div class=card><small>%s</small><b class=\"%s\">%s</b><small>%s</small></div>\n", what,
        style, value.c_str(), detail.c_str());
}

std::string summary_html(const RunResult &run) {
    const Totals &a = run.adapted, &s = run.skip;
    const RangeLoss both = compared(run);
    const double gain = both.skip - both.adapted;
    std::string html = "<div class=cards>";
    if (run.has_skip()) {
        html += card("Gain", format("%.3f nats", gain),
                     format("a token; %.1f %% of the loss", 100 * gain / both.skip),
                     gain >= 0 ? "good" : "bad");
        html += card("Loss", format("%.3f &rarr; %.3f", both.skip, both.adapted),
                     "SKIP &rarr; adapted");
        html += card("Perplexity",
                     format("%.2f &rarr; %.2f", std::exp(both.skip), std::exp(both.adapted)),
                     "SKIP &rarr; adapted");
        html += card("Time", format("%.2f&times;", s.tokens_per_second() / a.tokens_per_second()),
                     format("SKIP; %.0f tokens/s against %.0f", a.tokens_per_second(),
                            s.tokens_per_second()));
    } else {
        html += card("Loss", format("%.3f", a.token_loss()), "adapted");
        html += card("Perplexity", format("%.2f", std::exp(a.token_loss())), "adapted");
        html += card("Time", duration_text(a.seconds()),
                     format("%.0f tokens/s", a.tokens_per_second()));
    }
    html += card("Updates", format("%.0f %%", 100 * a.per_chunk(double(a.updates))),
                 format("of %s chunks, %s steps", with_commas(a.chunks).c_str(),
                        with_commas(a.steps).c_str()));
    html += card("Compute", flops_text(double(a.flops)),
                 run.has_skip() ? "SKIP: " + flops_text(double(s.flops)) : "");
    return html + "</div>\n";
}

std::string positions_html(const RunResult &run) {
    std::string html = "<h2>Loss by position in the stream</h2>\n<table><tr><th>chunks</th>";
    html += run.has_skip() ? "<th>SKIP</th><th>adapted</th><th>change</th></tr>\n"
                           : "<th>adapted</th></tr>\n";
    for (const RangeLoss &part : ranges(run)) {
        html += format("<tr><td>%llu&ndash;%llu</td>", (unsigned long long)part.first,
                       (unsigned long long)(part.first + part.count - 1));
        if (run.has_skip() && std::isnan(part.skip))
            html += format("<td>&ndash;</td><td>%.3f</td><td>&ndash;</td></tr>\n", part.adapted);
        else if (run.has_skip())
            html += format("<td>%.3f</td><td>%.3f</td><td class=%s>%+.3f</td></tr>\n", part.skip,
                           part.adapted, part.skip >= part.adapted ? "good" : "bad",
                           part.adapted - part.skip);
        else
            html += format("<td>%.3f</td></tr>\n", part.adapted);
    }
    return html + "</table>\n";
}

} // namespace

std::string html_report(const RunResult &run, const ponder_model *model) {
    std::string html = "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>"
                       "<meta name=viewport content=\"width=device-width,initial-scale=1\">"
                       "<title>ponder run</title><style>";
    html += page_style;
    html += "</style></head><body>\n<h1>What adapting gained</h1>\n";
    html += format("<p class=soft>%s &middot; %s files, %s tokens in chunks of %llu, context %s "
                   "&middot; %s (%s), %s%s</p>\n",
                   html_escape(valid_utf8(run.method)).c_str(), with_commas(run.files).c_str(),
                   with_commas(run.adapted.tokens).c_str(), (unsigned long long)run.chunk_tokens,
                   with_commas(run.context_tokens).c_str(), html_escape(run.model.backend).c_str(),
                   html_escape(run.model.isa).c_str(), html_escape(types_text(run.model)).c_str(),
                   run.adapted.causal ? "" : " &middot; <b>not causal (analysis)</b>");
    if (run.interrupted)
        html += "<p><b>Interrupted: the part that was done.</b></p>\n";
    if (run.chunks.empty())
        return html + "<p>No chunk was read.</p></body></html>\n";
    html += summary_html(run);
    html += "<h2>Loss over the stream</h2>\n<div class=key>";
    if (run.has_skip())
        html += "<span>- - SKIP: the frozen model</span>";
    html += "<span class=good>&mdash; adapted, before it learned from the chunk</span>"
            "<span>nats per token, moving average</span></div>\n";
    html += loss_curve(run);
    html += "<h2>Chunks</h2>\n<div class=key><span class=good>&#9632; loss, easier than SKIP</span>"
            "<span class=bad>&#9632; loss, harder</span><span>&#9472; SKIP</span></div>\n";
    html += chunk_bars(run);
    html += positions_html(run);
    html += tokens_html(run, model);
    html += "<div id=tip role=status aria-live=polite>Point at a token</div>\n<script>";
    html += page_script;
    return html + "</script></body></html>\n";
}

} // namespace tool
