"""Where training data come from, how they are cached, split and ordered."""
import gzip
import json
import lzma
import os
import re

from tool.harness import ponder
from tool.training import ADAPTER, BACKBONE, TrainingCase, json_lines, source


class Data(TrainingCase):
    def facts(self, *data, out="out", arguments=()):
        """What training for a step says about its data."""
        model = self.path("backbone")
        if not os.path.exists(model):
            self.backbone()
        result = self.succeeds("train", "adapter", "--model", model, "--data", *data, "--out",
                               self.path(out), "--cache", self.cache, *ADAPTER, "--steps", "1",
                               "--json", "-q", *arguments)
        found = json.loads(result.stdout)
        for name in os.listdir(self.path(out)):
            os.unlink(os.path.join(self.path(out), name))
        return found["data"], found["loss"]

    def refuses(self, *data):
        if not os.path.exists(self.path("backbone")):
            self.backbone()
        return self.fails(3, "train", "adapter", "--model", self.path("backbone"), "--data", *data,
                          "--out", self.path("out"), "--cache", self.cache, *ADAPTER, "-q")

    def caches(self):
        return sorted(name for name in os.listdir(self.cache) if name.endswith(".tokens"))

    def test_compressed_files_give_the_same_tokens(self):
        plain = self.content("data.jsonl")
        half = plain.index(b"\n", len(plain) // 2) + 1
        results = [self.facts(self.data)]
        for name, content in [
                ("a.jsonl.xz", lzma.compress(plain)), ("a.jsonl.gz", gzip.compress(plain)),
                ("b.jsonl.gz", gzip.compress(plain[:half]) + gzip.compress(plain[half:])),
                ("c.ndjson", plain)]:
            results.append(self.facts(self.write(name, content)))
        for data, loss in results:
            self.assertEqual(data["train_tokens"], results[0][0]["train_tokens"])
            self.assertEqual(loss, results[0][1])

    def test_text_alone_is_a_package_a_line(self):
        texts = [source("", i)["text"] * 4 for i in range(12)]
        lines = self.write("t.jsonl", json_lines({"text": text} for text in texts))
        together = self.write("u.jsonl", json_lines({"package": "p", "text": t} for t in texts))
        (apart, _), (one, _) = self.facts(lines), self.facts(together)
        self.assertEqual(apart["train_tokens"], one["train_tokens"])
        self.assertGreater(apart["units"], 1)
        halves, _ = self.facts(lines, arguments=["--valid-share", "0.5"])
        self.assertGreater(halves["valid_tokens"], 0)
        self.assertEqual(halves["valid_tokens"] + halves["train_tokens"], apart["train_tokens"])

    def test_long_texts_in_parts_are_the_same_tokens(self):
        # Above a part's size; the cut changes no token.
        text = "".join(source("", i)["text"] + "\n\n  x = 1\n" for i in range(24000))
        self.assertGreater(len(text), 1 << 20)
        whole, _ = self.facts(self.write("w.jsonl", json_lines([{"package": "p", "text": text}])))
        parts, _ = self.facts(self.write("w.txt", text))
        self.assertEqual(parts["train_tokens"], whole["train_tokens"])

    def test_folders(self):
        for package in ("one", "two"):
            for i in range(3):
                self.write(f"tree/{package}/{i}/a.py", source("", i)["text"] * 4)
        self.write("tree/setup.py", source("", 7)["text"] * 4)
        self.write("tree/two/binary", b"\0" * 100)
        self.write("tree/.git/x", b"")
        self.write("tree/.gitignore", "2/\n.gitignore\n")
        found, _ = self.facts(self.path("tree"))
        shares = [self.facts(self.path("tree"), arguments=["--valid-share", str(share / 10)])[0]
                  for share in range(1, 6)]
        self.assertTrue(all(s["valid_tokens"] + s["train_tokens"] == found["train_tokens"]
                            for s in shares))
        flat = [source("", i)["text"] * 4 for i in (7, 0, 1, 0, 1)]
        same, _ = self.facts(self.write("f.jsonl", json_lines({"text": t} for t in flat)))
        self.assertEqual(found["train_tokens"], same["train_tokens"])

    def test_a_package_is_on_one_side(self):
        valid = self.write("valid.jsonl", json_lines(source(f"p{i % 2}", 100 + i)
                                                     for i in range(16)))
        every, _ = self.facts(self.data)
        result = ponder("train", "adapter", "--model", self.path("backbone"), "--data", self.data,
                        "--valid", valid, "--out", self.path("o"), "--cache", self.cache, *ADAPTER,
                        "--steps", "1", "--json")
        found = json.loads(result.stdout)["data"]
        self.assertIn(b"2 packages are also in --valid", result.stderr)
        self.assertLess(found["train_tokens"], every["train_tokens"])

    def test_made_up_names_do_not_make_texts_the_same(self):
        def texts(start):
            return json_lines({"text": source("", i)["text"] * 8} for i in range(start, start + 6))
        train = [self.write("t/x.jsonl", texts(0)), self.write("t/x.txt", texts(0)),
                 os.path.dirname(self.write("t/x/a.py", texts(0)))]
        valid = [self.write("v/x.jsonl", texts(60)), self.write("v/x.txt", texts(60)),
                 os.path.dirname(self.write("v/x/a.py", texts(60)))]
        base, _ = self.facts(self.data)
        for data, held in zip(train, valid):
            every, _ = self.facts(data)
            for measured, left in [(held, every["train_tokens"]), (data, 0)]:
                found, _ = self.facts(data, self.data, arguments=["--valid", measured])
                self.assertEqual(found["train_tokens"], base["train_tokens"] + left)

    def test_made_up_names_side_by_side_are_packages_of_their_own(self):
        def texts(folder, start):
            return self.write(f"{folder}/x.txt", "".join(source("", i)["text"] * 8
                                                         for i in range(start, start + 6)))
        one, other = texts("a", 0), texts("b", 60)
        alone, _ = self.facts(one)
        both, _ = self.facts(one, other)
        self.assertGreater(both["train_tokens"], alone["train_tokens"])
        for measured in [[other], [other, self.write("c/x.txt", "c = 1\n")]]:
            found, _ = self.facts(one, other, arguments=["--valid", *measured])
            self.assertEqual(found["train_tokens"], alone["train_tokens"])

    def test_the_tokenizer_learns_nothing_from_what_is_measured(self):
        lines = self.content("data.jsonl").splitlines(keepends=True)
        def tokenizer(out, data, *arguments):
            self.train("backbone", out, *BACKBONE, "--vocab", "300", "--steps", "1", "-q", *arguments,
                       data=data)
            return self.content(out, "tokenizer.json")
        valid = self.write("valid.jsonl", json_lines([source("p2", 0)]))
        rest = self.write("rest.jsonl", b"".join(line for line in lines if b'"p2"' not in line))
        self.assertEqual(tokenizer("a", self.data, "--valid", valid), tokenizer("b", rest))
        self.assertNotEqual(self.content("a", "tokenizer.json"), tokenizer("c", self.data))
        # The same where lines are packages of their own.
        bare = [json_lines([{"text": source("", i)["text"]}]) for i in range(48)]
        every = self.write("every.jsonl", b"".join(bare))
        some = self.write("some.jsonl", b"".join(bare[:30]))
        rest = self.write("others.jsonl", b"".join(bare[30:]))
        self.assertEqual(tokenizer("d", every, "--valid", some), tokenizer("e", rest))

    def test_cache_is_found_again_and_made_anew(self):
        first, loss = self.facts(self.data)
        names = self.caches()
        stamp = os.stat(os.path.join(self.cache, names[0])).st_mtime_ns
        self.assertEqual(self.facts(self.data), (first, loss))
        self.assertEqual((self.caches(), os.stat(os.path.join(self.cache, names[0])).st_mtime_ns),
                         (names, stamp))
        # Content counts, not the name of the folder or the time.
        self.write("elsewhere/data.jsonl", self.content("data.jsonl"))
        self.facts(self.path("elsewhere/data.jsonl"))
        self.assertEqual(self.caches(), names)
        self.facts(self.write("data.jsonl", self.content("data.jsonl").replace(b"print", b"point")))
        self.assertEqual(len(self.caches()), len(names) + 1)

    def test_another_tokenizer_is_another_cache(self):
        self.facts(self.data)
        before = self.caches()
        self.backbone("other", vocabulary="280")
        self.assertGreater(len(self.caches()), len(before))

    def test_damaged_caches_are_made_again(self):
        good = self.facts(self.data)
        path = os.path.join(self.cache, self.caches()[0])
        with open(path, "rb") as file:
            whole = file.read()
        for at in [0, 9, 20, 40, 60, 80, 100, len(whole) // 2, len(whole) - 20, len(whole) - 1]:
            self.damaged(path, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:], good, whole)
        for cut in [b"", whole[:50], whole[:-1], whole + b"x"]:
            self.damaged(path, cut, good, whole)

    def damaged(self, path, content, good, whole):
        with open(path, "wb") as file:
            file.write(content)
        result = self.succeeds("train", "adapter", "--model", self.path("backbone"), "--data",
                               self.data, "--out", self.path("out"), "--cache", self.cache,
                               *ADAPTER, "--steps", "1")
        self.assertRegex(result.stderr.decode(), re.escape(path) + r": damaged \(.*made again")
        with open(path, "rb") as file:
            self.assertEqual(file.read(), whole)
        for name in os.listdir(self.path("out")):
            os.unlink(os.path.join(self.path("out"), name))
        self.assertEqual(self.facts(self.data), good)

    def test_default_cache_folder(self):
        self.backbone()
        command = ["train", "adapter", "--model", self.path("backbone"), "--data", self.data,
                   *ADAPTER, "--steps", "1", "-q", "--out"]
        self.succeeds(*command, self.path("x"), environment={"XDG_CACHE_HOME": self.path("xdg")})
        self.assertTrue(os.listdir(self.path("xdg/ponder")))
        self.succeeds(*command, self.path("y"), environment={"XDG_CACHE_HOME": "",
                                                             "HOME": self.path("home")})
        self.assertTrue(os.listdir(self.path("home/.cache/ponder")))

    def test_hostile_data_name_file_and_place(self):
        plain = self.content("data.jsonl")
        xz, gz = lzma.compress(plain), gzip.compress(plain)
        flipped = bytearray(gz)
        flipped[len(gz) // 2] ^= 0xff
        for name, content, what in [
                ("a.jsonl", plain + b"{\n", r"a\.jsonl:49: no valid JSON at byte \d+"),
                ("b.jsonl", plain + b'{"package": "a"}\n', r'b\.jsonl:49: "text" is missing'),
                ("c.jsonl", b'{"text": "\xff"}\n', r"c\.jsonl:1: no valid JSON at byte \d+"),
                ("d.jsonl", b"[1]\n", r"d\.jsonl:1: the line is no object"),
                ("e.jsonl.xz", xz[:-30], r"e\.jsonl\.xz: the \.xz data ends too early at byte \d+"),
                ("f.jsonl.xz", xz[:40] + b"XXXX" + xz[44:], r"f\.jsonl\.xz: the \.xz data is damaged"),
                ("g.jsonl.gz", gz[:-30], r"g\.jsonl\.gz: the \.gz data ends too early at byte \d+"),
                ("h.jsonl.gz", bytes(flipped), r"h\.jsonl\.gz"),
                ("i.jsonl.gz", gz + b"garbage", r"i\.jsonl\.gz: the \.gz data is damaged at byte \d+"),
                ("j.txt", b"\0\0\0", r"j\.txt: is no text")]:
            with self.subTest(name=name):
                self.assertRegex(self.refuses(self.write(name, content)), what)
                self.assertEqual([n for n in os.listdir(self.cache) if n.endswith(".part")], [])
        self.refuses(self.path("none.jsonl"))
        self.fails(2, "train", "adapter", "--data", "-", "--out", self.path("out"), "--model",
                   self.path("backbone"), *ADAPTER, "-q")

    def test_cache_that_cannot_be_written(self):
        self.backbone()
        file = self.write("file", b"")
        self.fails(3, "train", "adapter", "--model", self.path("backbone"), "--data", self.data,
                   "--out", self.path("out"), "--cache", file + "/below", *ADAPTER, "-q")
