"""ponder eval: counts, defaults, hostile streams."""
import json
import lzma

from tool.harness import Case, SMALL, TEXT


class Eval(Case):
    KEYS = ["method", "backend", "isa", "dtype", "chunks", "predictions", "loss", "updates",
            "steps", "update_rate", "cost", "flops", "seconds", "tokens_per_second", "peak_rss_bytes",
            "by_position", "packages", "causal"]

    def stream(self, packages, name="s.jsonl"):
        lines = [json.dumps({"package": package, "path": f"{i}", "text": text}) + "\n"
                 for package, texts in packages for i, text in enumerate(texts)]
        content = "".join(lines).encode()
        return self.write(name, lzma.compress(content) if name.endswith(".xz") else content)

    def test_counts(self):
        # A document without text is one token, the end-of-text id: the counts are exact.
        path = self.stream([("seven", [""] * 63), ("eight", [""] * 71), ("many", [""] * 400)])
        found = self.object_of("eval", "--stream", path, "--chunk", "8", "--max-chunks", "10",
                               "--set", "lora.rank=1")
        for key in self.KEYS:
            self.assertIn(key, found)
        self.assertEqual([(p["name"], p["chunks"]) for p in found["packages"]],
                         [("eight", 8), ("many", 10)])
        self.assertEqual(found["chunks"], 18)
        self.assertEqual(found["predictions"], 18 * 7)
        self.assertEqual(found["packages_skipped"], 1)
        self.assertEqual(len(found["by_position"]), 3)
        self.assertEqual((found["updates"], found["steps"], found["cost"]), (18, 18, 1.0))
        total = sum(p["loss"] * p["chunks"] for p in found["packages"]) / 18
        self.assertAlmostEqual(found["loss"], total, 9)
        places = found["by_position"]
        mean = (8 * places[0] + 8 * places[1] + 2 * places[2]) / 18
        self.assertAlmostEqual(found["loss"], mean, 9)
        self.assertAlmostEqual(found["tokens_per_second"] * found["seconds"], 18 * 8, 3)
        self.assertTrue(found["causal"])

    def test_defaults_of_the_instrument(self):
        path = self.stream([("a", [TEXT])])
        found = self.object_of("eval", "--stream", path, "--chunk", "16", "--set", "lora.rank=1")
        options = found["options"]
        self.assertEqual((options["context"], options["guard.norm"], options["budget.rate"]),
                         ("16", "inf", "inf"))
        self.assertEqual(found["method"], "lora always")
        again = self.object_of("eval", "--stream", path, "--chunk", "16", "--set", "lora.rank=1",
                               "--context", "32", "--set", "guard.norm=3", "--steps", "2")
        self.assertEqual((again["options"]["context"], again["options"]["guard.norm"]), ("32", "3"))
        self.assertEqual(again["method"], "lora always, 2 steps")

    def test_packages_start_fresh(self):
        path = self.stream([("a", [TEXT, TEXT]), ("b", [TEXT, TEXT])])
        found = self.object_of("eval", "--stream", path, *SMALL, "--policy", "random:0.5")
        first, second = found["packages"]
        self.assertEqual(first["loss"], second["loss"])

    def test_xz_gives_the_same(self):
        packages = [("a", [TEXT])]
        results = [self.object_of("eval", "--stream", self.stream(packages, name), *SMALL)
                   for name in ["s.jsonl", "s.jsonl.xz"]]
        self.assertEqual(results[0]["loss"], results[1]["loss"])
        self.assertEqual(results[0]["flops"], results[1]["flops"])

    def test_concatenated_xz(self):
        half = json.dumps({"package": "a", "path": "", "text": TEXT}).encode() + b"\n"
        path = self.write("s.xz", lzma.compress(half) + lzma.compress(half))
        plain = self.write("s", half + half)
        found, expected = [self.object_of("eval", "--stream", p, *SMALL) for p in (path, plain)]
        self.assertEqual(found["packages"], expected["packages"])

    def test_policy_that_needs_the_length(self):
        path = self.stream([("a", [""] * 80)])
        found = self.object_of("eval", "--stream", path, "--chunk", "8", "--policy", "first:0.5")
        self.assertEqual((found["chunks"], found["updates"], found["cost"]), (10, 5, 0.5))

    def test_frozen(self):
        path = self.stream([("a", [TEXT])])
        found = self.object_of("eval", "--stream", path, *SMALL, "--adapter", "none")
        self.assertEqual((found["method"], found["updates"], found["steps"]), ("skip", 0, 0))

    def test_table_for_people(self):
        path = self.stream([("a", [TEXT])])
        out = self.succeeds("eval", "--stream", path, *SMALL).stdout.decode()
        for part in ["loss", "nats/token", "package", "by position", "peak memory"]:
            self.assertIn(part, out)

    def test_malformed_lines_name_file_and_line(self):
        good = '{"package": "a", "path": "p", "text": "t"}\n'
        for bad, what in [("{\n", "no valid JSON"), ("[]\n", "no object"), ("3\n", "no object"),
                          ('{"package": "a", "path": "p"}\n', '"text" is missing'),
                          ('{"path": "p", "text": "t"}\n', '"package" is missing'),
                          ('{"package": 1, "path": "p", "text": "t"}\n', '"package" is no string'),
                          ('{"package": "a", "text": "t", "text": "u"}\n', "twice"),
                          (good.strip() + "x\n", "no valid JSON"),
                          ('{"a": ' + "[" * 100000 + "\n", "no valid JSON")]:
            with self.subTest(bad=bad[:40]):
                path = self.write("bad.jsonl", good + "\n" + bad)
                message = self.fails(3, "eval", "--stream", path, *SMALL, "-q")
                self.assertIn("bad.jsonl:3: ", message)
                self.assertIn(what, message)

    def test_text_that_is_no_utf8(self):
        path = self.write("bad.jsonl", b'{"package": "a", "path": "", "text": "\xff"}\n')
        self.assertIn("bad.jsonl:1: ", self.fails(3, "eval", "--stream", path, *SMALL, "-q"))

    def test_other_members_and_escapes_are_fine(self):
        line = '{"extra": {"text": [1, null]}, "package": "a", "text": "\\u00e9\\n", "path": ""}\n'
        path = self.write("s.jsonl", line * 60)
        found = self.object_of("eval", "--stream", path, *SMALL)
        self.assertEqual(found["packages"][0]["name"], "a")

    def test_damaged_xz(self):
        data = lzma.compress(json.dumps({"package": "a", "path": "", "text": TEXT}).encode())
        path = self.write("cut.xz", data[:-20])
        self.assertIn("too early", self.fails(3, "eval", "-q", "--stream", path))
        broken = data[:30] + bytes([data[30] ^ 0xff]) + data[31:]
        path = self.write("bad.xz", broken)
        self.assertIn("damaged", self.fails(3, "eval", "-q", "--stream", path))

    def test_no_package_is_long_enough(self):
        path = self.stream([("a", ["short"])])
        self.assertIn("no package", self.fails(3, "eval", "--stream", path, "-q"))
