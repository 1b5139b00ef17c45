"""Adapter folders: PEFT, merging, and the one that lies beside the default model."""
import json
import os
import shutil

from tool import harness
from tool.harness import SMALL, TEXT
from tool.training import ADAPTER, TrainingCase


class Adapter(TrainingCase):
    def setUp(self):
        super().setUp()
        self.model = self.backbone()
        self.train("adapter", "a", "--model", self.model, *ADAPTER, "--steps", "4", "--set",
                   "train.lr=0.05", "--set", "train.warmup=0")

    def loss(self, model, adapter):
        return self.object_of("eval", "--stream", self.data, "--model", model, "--adapter", adapter,
                              "--policy", "skip", "--chunk", "16", "--min-chunks", "2")["loss"]

    def test_to_peft_and_back(self):
        self.succeeds("adapter", "export-peft", self.path("a"), self.path("p"))
        self.assertEqual(self.files("p"), ["adapter_config.json", "adapter_model.safetensors"])
        with open(self.path("p/adapter_config.json")) as file:
            config = json.load(file)
        self.assertEqual((config["r"], config["lora_alpha"], config["fan_in_fan_out"]), (2, 2, True))
        self.succeeds("adapter", "import-peft", self.path("p"), self.path("b"), "--model", self.model)
        self.assertEqual(self.loss(self.model, self.path("b")), self.loss(self.model, self.path("a")))
        message = self.fails(3, "adapter", "export-peft", self.path("none"), self.path("q"), "-q")
        self.assertIn("none", message)

    def test_merge(self):
        self.succeeds("adapter", "merge", self.path("a"), self.path("m"), "--model", self.model)
        self.assertAlmostEqual(self.loss(self.path("m"), "none"),
                               self.loss(self.model, self.path("a")), 5)
        message = self.fails(3, "adapter", "merge", self.path("a"), self.path("n"), "-q")
        self.assertIn("'model'", message)  # made for another one than the default

    def test_usage(self):
        for arguments in [[], ["merge"], ["merge", "a"], ["split", "a", "b"]]:
            self.fails(2, "adapter", *arguments)

    def test_folders_that_are_no_adapter(self):
        path = self.write("text", TEXT)
        self.write("empty/x", "")
        self.write("odd/ponder.json", "{}")
        for folder in ("none", "empty", "odd"):
            code = harness.ponder("run", path, "--adapter", self.path(folder), "-q")
            self.assertIn(code.returncode, (2, 3))
            self.assertIn(folder.encode(), code.stderr)
        message = self.fails(3, "run", path, "--adapter", self.path("a"), "-q")
        self.assertIn("'model'", message)


class DefaultAdapter(TrainingCase):
    def setUp(self):
        """A tool with a model of its own beside it."""
        super().setUp()
        os.makedirs(self.path("models"))
        shutil.copy(harness.TOOL, self.path("ponder"))
        harness_tool, harness.TOOL = harness.TOOL, self.path("ponder")
        self.addCleanup(setattr, harness, "TOOL", harness_tool)
        library = os.path.join(os.path.dirname(harness_tool), "../src/api")
        old = os.environ.get("LD_LIBRARY_PATH")
        os.environ["LD_LIBRARY_PATH"] = library + (":" + old if old else "")
        self.addCleanup(lambda: os.environ.pop("LD_LIBRARY_PATH") if old is None
                        else os.environ.update(LD_LIBRARY_PATH=old))
        self.backbone("models/code-10m")
        self.train("adapter", "models/code-10m/adapter", *ADAPTER, "--steps", "2")

    def test_run_and_info_use_it(self):
        path = self.write("text", TEXT)
        stored = self.path("models/code-10m/adapter")
        short = ["--chunk", "16", "--context", "16"]
        for command in (["run", path], ["info"]):
            found = self.object_of(*command, *short)
            self.assertEqual(found["options"]["adapter"], stored)
            self.assertIn("code-10m/adapter", json.dumps(found))
            for other in (["--adapter", "lora"], ["--set", "lora.rank=3"],
                          ["--model", self.path("models/code-10m")]):
                found = self.object_of(*command, *short, *other)
                self.assertEqual(found["options"]["adapter"], "lora")
        found = self.object_of("eval", "--stream", self.data, *SMALL, "--min-chunks", "2")
        self.assertEqual(found["options"]["adapter"], "lora")
        found = self.object_of("eval", "--stream", self.data, *short, "--min-chunks", "2")
        self.assertEqual(found["options"]["adapter"], "lora")
