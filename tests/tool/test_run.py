"""ponder run: the stream, its JSON object and its table."""
from tool.harness import Case, SMALL, TEXT


class Run(Case):
    KEYS = ["schema_version", "method", "backend", "isa", "dtype", "model", "causal", "complete",
            "files", "files_left_out", "bytes", "chunk_tokens", "context_tokens", "adapted", "skip",
            "gain", "time_ratio", "updates", "steps", "update_rate", "cost", "rollbacks",
            "by_position", "records", "options"]

    def test_json_has_all_keys_and_agrees_with_itself(self):
        path = self.write("a.py", TEXT)
        found = self.object_of("run", path, *SMALL)
        for key in self.KEYS:
            self.assertIn(key, found)
        records = found["records"]
        self.assertEqual(found["adapted"]["chunks"], len(records))
        self.assertEqual(found["adapted"]["tokens"], sum(r["tokens"] for r in records))
        self.assertEqual(found["skip"]["tokens"], found["adapted"]["tokens"])
        weight = sum(r["tokens"] - 1 for r in records)
        for name, key in [("adapted", "loss"), ("skip", "skip_loss")]:
            mean = sum(r[key] * (r["tokens"] - 1) for r in records) / weight
            self.assertAlmostEqual(mean, found[name]["loss"], 5)
        gain = found["skip"]["loss"] - found["adapted"]["loss"]
        self.assertAlmostEqual(found["gain"]["nats"], gain, 6)
        self.assertGreater(gain, 0)  # the text repeats itself
        self.assertEqual(found["updates"], len(records))
        self.assertEqual(len(found["by_position"]), 8)
        self.assertEqual(records[0]["loss"], records[0]["skip_loss"])  # nothing learned yet
        self.assertTrue(found["complete"])
        self.assertEqual(found["options"]["lora.rank"], "2")

    def test_the_last_short_chunk_is_scored(self):
        path = self.write("a.py", TEXT)
        found = self.object_of("run", path, *SMALL)
        last = found["records"][-1]["tokens"]
        self.assertTrue(2 <= last <= 16)
        self.assertEqual(last, found["adapted"]["tokens"] - 16 * (len(found["records"]) - 1))

    def test_files_and_standard_input_give_the_same_stream(self):
        path = self.write("a.py", TEXT)
        file = self.object_of("run", path, *SMALL, "--no-baseline")
        piped = self.object_of("run", "-", *SMALL, "--no-baseline", stdin=TEXT.encode())
        self.assertEqual(file["adapted"]["loss"], piped["adapted"]["loss"])
        self.assertEqual(piped["files"], 1)

    def test_without_baseline(self):
        found = self.object_of("run", "-", *SMALL, "--no-baseline", stdin=TEXT.encode())
        self.assertNotIn("skip", found)
        self.assertIsNone(found["records"][0]["skip_loss"])

    def test_table(self):
        result = self.succeeds("run", "-", *SMALL, stdin=TEXT.encode())
        text = result.stdout.decode()
        for part in ["SKIP", "adapted", "perplexity", "Loss by position", "Updates:", "GFLOP",
                     "tokens/s", "times SKIP"]:
            self.assertIn(part, text)
        self.assertLessEqual(max(len(line) for line in text.splitlines()), 80)
        self.assertNotIn("\033", text)

    def test_full_context_is_the_default(self):
        found = self.object_of("run", "-", "--chunk", "64", "--adapter", "none", "--no-baseline",
                               stdin=TEXT.encode())
        self.assertEqual(found["context_tokens"], 1024)
        self.assertEqual(found["options"]["context"], "0")
        self.assertEqual(found["options"]["guard.norm"], "16")

    def test_policy_that_needs_the_length(self):
        found = self.object_of("run", "-", *SMALL, "--policy", "first:0.5", "--no-baseline",
                               stdin=TEXT.encode())
        updated = [r["updated"] for r in found["records"]]
        half = (len(updated) + 1) // 2
        self.assertEqual(updated, [True] * half + [False] * (len(updated) - half))

    def test_policies_that_read_ahead_are_for_eval(self):
        path = self.write("a.py", TEXT)
        for command in (["run", path], ["generate", "--read", path, "--prompt", "x"]):
            message = self.fails(2, *command, *SMALL, "--policy", "oracle:0.5", "-q")
            self.assertIn("ponder eval", message)

    def test_whole_numbers_in_any_form(self):
        found = [self.object_of("run", "-", "--chunk", chunk, "--context", context, *SMALL[4:],
                                "--no-baseline", stdin=TEXT.encode())
                 for chunk, context in (("16", "32"), ("1.6e1", "3.2e1"))]
        self.assertEqual(found[0]["context_tokens"], 32)
        self.assertEqual(found[1]["context_tokens"], 32)
        self.assertEqual(found[0]["adapted"]["loss"], found[1]["adapted"]["loss"])

    def test_set_wins_over_the_flag(self):
        found = self.object_of("run", "-", *SMALL, "--steps", "2", "--set", "steps=0",
                               "--no-baseline", stdin=TEXT.encode())
        self.assertEqual((found["steps"], found["options"]["steps"]), (0, "0"))

    def test_only_binary_files(self):
        path = self.write("b", b"\0\0")
        self.assertIn("nothing to read", self.fails(3, "run", path, *SMALL, "-q"))

    def test_quiet(self):
        result = self.succeeds("run", "-", *SMALL, "--quiet", stdin=TEXT.encode())
        self.assertEqual(result.stderr, b"")
