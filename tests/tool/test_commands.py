"""info, backends, bench, help and exit codes."""
import json
import subprocess

from tool import harness
from tool.harness import Case, TEXT


class OtherCommands(Case):
    def test_info(self):
        found = self.object_of("info")
        self.assertEqual(found["model"]["architecture"], "gpt2")
        self.assertEqual(found["model"]["parameters"], 10257408)
        plan = found["memory_plan"]
        self.assertGreater(plan["weights"], 10257408)
        self.assertEqual(plan["total"], sum(plan[key] for key in [
            "weights", "packed_weights", "fast_weights", "optimizer", "activations", "workspace"]))
        self.assertTrue(found["options"]["adapter"].endswith("code-10m/adapter"))

    def test_info_of_the_plan_alone(self):
        found = self.object_of("info", "--plan-only", "--adapter", "none")
        self.assertNotIn("model", found)
        self.assertEqual(found["memory_plan"]["fast_parameters"], 0)
        out = self.succeeds("info", "--plan-only").stdout.decode()
        self.assertIn("Memory plan", out)

    def test_options_in_force_are_those_of_the_adapter(self):
        with open(self.object_of("info")["options"]["adapter"] + "/ponder.json") as file:
            stored = json.load(file)["options"]
        path = self.write("a", TEXT)
        line = json.dumps({"package": "p", "text": TEXT}) + "\n"
        stream = self.write("s.jsonl", line)
        folder = self.object_of("info")["options"]["adapter"]
        for command in (["info"], ["info", "--plan-only"],
                        ["run", path, "--chunk", "64", "--no-baseline"],
                        ["eval", "--stream", stream, "--adapter", folder, "--chunk", "64",
                         "--min-chunks", "1"]):
            found = self.object_of(*command)
            self.assertEqual({name: found["options"][name] for name in stored}, stored)
            self.assertIn("adapter adapter", found.get("method", found.get("adapter")))
        # What is asked for stays, if it is no part of the adapter's structure.
        found = self.object_of("info", "--plan-only", "--set", "inner.lr=1e-4", "--policy", "every:3",
                               "--adapter", folder, "--set", "lora.rank=1")["options"]
        self.assertEqual([found[name] for name in ("inner.lr", "policy", "lora.rank")],
                         ["1e-4", "every:3", stored["lora.rank"]])

    def test_convert(self):
        model, small = self.object_of("info", "--plan-only")["path"], self.path("small")
        found = self.object_of("convert", model, small, "--weights", "int8")
        self.assertLess(found["bytes_after"], 0.53 * found["bytes_before"])
        plain = self.object_of("info", "--dtype", "bf16")
        for arguments in [["--model", small], ["--weights", "int8"]]:
            info = self.object_of("info", "--dtype", "bf16", *arguments)
            self.assertEqual(info["model"]["weights"], "int8")
            self.assertEqual(info["model"]["hash"], plain["model"]["hash"])
            for part in ["weights", "packed_weights"]:
                self.assertLess(info["memory_plan"][part], 0.56 * plain["memory_plan"][part])
        self.assertIn(b"bf16, int8 weights",
                      self.succeeds("info", "--model", small, "--dtype", "bf16").stdout)
        # The adapter came along, and reading learns with it as before.
        ran = [self.object_of("run", harness.__file__, "--chunk", "64", "--policy", "always",
                              *arguments)
               for arguments in [[], ["--model", small, "--adapter", small + "/adapter"]]]
        self.assertEqual(ran[1]["weights"], "int8")
        self.assertAlmostEqual(ran[0]["adapted"]["loss"], ran[1]["adapted"]["loss"], delta=0.05)
        self.fails(1, "convert", model, small, "--weights", "int8")
        self.fails(3, "convert", self.path("none"), self.path("b"), "--weights", "int8")
        for arguments in [["convert", model, self.path("b")], ["convert", model],
                          ["convert", model, self.path("b"), "--weights", "int4"],
                          ["info", "--weights", "int4"]]:
            self.fails(2, *arguments)

    def test_backends(self):
        found = self.object_of("backends")
        reference = [b for b in found["backends"] if b["name"] == "reference"]
        self.assertEqual(len(reference), 1)
        self.assertTrue(reference[0]["available"])
        self.assertEqual(reference[0]["dtypes"][0], "f32")
        self.assertIn("reference", self.succeeds("backends").stdout.decode())

    def test_backends_say_why_not(self):
        self.write("ponder-broken.so", "no ELF file")
        found = self.object_of("backends", "--backend-path", self.folder)
        broken = [b for b in found["backends"] if not b["available"] and "broken" in b["path"]]
        self.assertEqual(len(broken), 1)
        self.assertTrue(broken[0]["reason"])
        self.assertIn(broken[0]["reason"],
                      self.succeeds("backends", "--backend-path", self.folder).stdout.decode())

    def test_bench(self):
        found = self.object_of("bench", "--chunk", "16", "--chunks", "2", "--repeats", "2")
        for side in ["skip", "update"]:
            for key in ["tokens_per_second", "gflops_per_second", "share_of_matrix_rate"]:
                self.assertGreater(found[side][key], 0)
        self.assertGreater(found["update_over_skip"], 0)
        self.assertAlmostEqual(sum(entry["share"] for entry in found["profile"]), 1, 6)
        self.assertIn("linear", [entry["op"] for entry in found["profile"]])
        self.assertEqual({entry["where"] for entry in found["profile"]}, {"score", "learn"})

    def test_bench_updates_in_spite_of_a_gate(self):
        folder = self.object_of("info", "--plan-only")["options"]["adapter"]
        found = self.object_of("bench", "--adapter", folder, "--chunk", "16", "--chunks", "2",
                               "--repeats", "1")
        self.assertTrue(found["method"].endswith("always"), found["method"])
        steps = self.object_of("info", "--plan-only", "--adapter", folder, "--chunk", "16",
                               "--context", "16")["memory_plan"]
        self.assertAlmostEqual(found["update"]["flops_per_chunk"],
                               steps["flops_score"] + steps["flops_step"], -3)

    def test_bench_table(self):
        out = self.succeeds("bench", "--chunk", "16", "--chunks", "1", "--repeats", "1").stdout
        self.assertIn(b"times SKIP", out)

    def test_help_teaches(self):
        out = self.succeeds("--help").stdout.decode()
        for part in ["run", "eval", "train", "report", "adapter", "convert", "info", "backends", "bench",
                     "Exit status", "130"]:
            self.assertIn(part, out)
        out = self.succeeds("run", "--help").stdout.decode()
        for part in ["--policy", "lora.rank=16", "--set", "Examples", "threshold:SIGNAL:X"]:
            self.assertIn(part, out)
        self.assertIn("context", self.succeeds("eval", "--help").stdout.decode())

    def test_help_fits_a_narrow_terminal(self):
        for command in [[], ["run"], ["eval"], ["train"], ["report"], ["adapter"], ["info"],
                        ["backends"], ["bench"]]:
            out = self.succeeds(*command, "--help").stdout.decode()
            self.assertLessEqual(max(len(line) for line in out.splitlines()), 88)

    def test_version(self):
        self.assertRegex(self.succeeds("--version").stdout, rb"\Aponder \d+\.\d+\.\d+\n\Z")


class ExitCodes(Case):
    def test_usage(self):
        path = self.write("a", TEXT)
        for arguments in [[], ["frobnicate"], ["run", "--nonsense"], ["run", "--steps"],
                          ["run", path, "--steps", "x"], ["run", path, "--steps", "999"],
                          ["run", path, "--set", "lora.rank"], ["run", path, "--set", "no.such=1"],
                          ["run", path, "--policy", "sometimes"], ["run", path, "--dtype", "f64"],
                          ["run", path, "--threads", "9999"], ["eval"],
                          ["run", path, "--memory-limit", "lots"],
                          ["run", path, "--chunk", "4096"]]:
            with self.subTest(arguments=arguments):
                self.fails(2, *arguments, *(["-q"] if arguments else []))

    def test_files(self):
        path = self.write("a", TEXT)
        self.write("model/config.json", "{}")
        for arguments in [["run", self.path("none")], ["run", path, "--model", self.path("none")],
                          ["run", path, "--model", self.path("model")],
                          ["eval", "--stream", self.path("none")],
                          ["eval", "--stream", self.folder],
                          ["info", "--model", self.path("none")]]:
            with self.subTest(arguments=arguments):
                self.fails(3, *arguments, "-q")

    def test_backend(self):
        path = self.write("a", TEXT)
        for command in [["run", path], ["info"], ["bench"]]:
            message = self.fails(4, *command, "--backend", "abacus", "-q")
            self.assertIn("abacus", message)

    def test_memory(self):
        path = self.write("a", TEXT)
        self.fails(5, "run", path, "--memory-limit", "1M", "-q")

    def test_standard_output_that_cannot_be_written(self):
        with open("/dev/full", "wb") as full:
            result = subprocess.run([harness.TOOL, "backends"], stdout=full, stderr=subprocess.PIPE)
        self.assertEqual(result.returncode, 1)
