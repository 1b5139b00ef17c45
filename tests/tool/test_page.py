"""The page of ponder run --html."""
import html.parser
import re

from tool.harness import Case, SMALL, TEXT


class PageReader(html.parser.HTMLParser):
    """Checks that tags nest, and collects the tokens' text without the marks for bytes."""
    VOID = {"meta", "line", "rect", "circle", "polyline"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.marks, self.errors = [], "", [], []
        self.scripts = self.tokens = 0

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        self.tokens += tag == "i"
        for name, value in attributes:
            if name in ("src", "href") or name.startswith("on") or "url(" in (value or ""):
                self.errors.append((tag, name, value))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.errors.append(("unbalanced", tag, list(self.open)))
        else:
            self.open.pop()

    def handle_data(self, data):
        if "pre" in self.open and "i" in self.open:
            if "u" in self.open:
                self.marks.append(data)
            else:
                self.text += data


class Page(Case):
    def page(self, content, *arguments):
        path = self.write("stream", content)
        target = self.path("page.html")
        self.succeeds("run", path, *SMALL, "--html", target, *arguments)
        with open(target, encoding="utf-8") as file:  # strict: the page itself is valid UTF-8
            return file.read()

    def test_self_contained_and_escaped(self):
        text = "x = \"<script>alert('1')</script>\" & 'y' # http://example.org\n" * 3
        page = self.page(text)
        reader = PageReader()
        reader.feed(page)
        self.assertEqual(reader.errors, [])
        self.assertEqual(reader.open, [])
        self.assertEqual(reader.scripts, 1)
        self.assertNotIn("@import", page)
        self.assertNotRegex(re.sub(r"<pre.*?</pre>", "", page, flags=re.S), r"https?:")
        self.assertEqual(reader.text, "<|endoftext|>" + text)

    def test_bytes_and_control_characters_are_visible(self):
        page = self.page(b"caf\xe9 \x1b[0m \xe2\x80\xaegnp \x7f\n" * 4)
        reader = PageReader()
        reader.feed(page)
        for mark in ["\\xe9", "\u241b", "U+202E", "\u2421", "\u21b5"]:
            self.assertIn(mark, reader.marks)
        for raw in ["\x1b", "\u202e", "\x7f"]:
            self.assertNotIn(raw, page)

    def test_characters_spread_over_tokens_are_whole(self):
        text = "\u6f22\u5b57 \U0001f600 na\u00efve\n"
        reader = PageReader()
        reader.feed(self.page(text))
        self.assertIn("<|endoftext|>" + text.split()[0], reader.text)
        self.assertIn("\U0001f600", reader.text)

    def test_every_token_has_its_losses(self):
        page = self.page(TEXT)
        chunks = page.count("<pre")
        tokens = page.count("<i")
        self.assertEqual(len(re.findall(r'data-l="\d+\.\d\d \d+\.\d\d"', page)), tokens - chunks)
        self.assertRegex(page, r"class=e[1-4]")

    def test_gate_scores_are_drawn(self):
        page = self.page(TEXT, "--policy", "threshold:loss:1.5")
        self.assertIn("class=gate", page)
        self.assertIn("class=limit", page)

    def test_without_baseline(self):
        page = self.page(TEXT, "--no-baseline")
        self.assertNotIn("class=e", page)
        self.assertIn("no SKIP pass", page)

    def test_page_that_cannot_be_written(self):
        path = self.write("a", TEXT)
        self.fails(3, "run", path, *SMALL, "-q", "--html", self.path("no/such/folder.html"))
