"""A gate: trained, calibrated, used."""
import json
import math
import os

from tool.training import ADAPTER, TrainingCase


class Gate(TrainingCase):
    GATE = ["--chunk", "16", "--batch", "4", "--chunks", "8", "--steps", "2", "--set",
            "gate.hidden=4", "--set", "gate.horizon=2", "--set", "gate.samples=3"]

    def setUp(self):
        super().setUp()
        self.model = self.backbone()
        self.train("adapter", "a", "--model", self.model, *ADAPTER, "--steps", "1")
        self.train("gate", "g", "--model", self.model, "--adapter", self.path("a"), *self.GATE)

    def stored(self):
        with open(self.path("g/ponder.json")) as file:
            return json.load(file)

    def calibrate(self, *arguments):
        return self.object_of("calibrate", "--model", self.model, "--adapter", self.path("g"),
                              "--chunk", "16", "--min-chunks", "4", "--stream", self.data,
                              *arguments)

    def evaluate(self, *arguments):
        return self.object_of("eval", "--model", self.model, "--adapter", self.path("g"),
                              "--chunk", "16", "--min-chunks", "4", "--stream", self.data,
                              "--policy", "adapter", *arguments)

    def test_trained_gates_hold_their_cost(self):
        folder = self.stored()
        self.assertEqual(folder["options"]["policy"], "adapter")
        self.assertEqual(folder["gate"]["form"], "steps")
        for rate in (0.25, 0.5):
            found = self.evaluate("--set", f"policy.target_rate={rate}")
            self.assertTrue(found["causal"])
            self.assertLessEqual(found["cost"], rate)
            self.assertGreater(found["cost"], rate / 2)

    def test_calibrated_to_a_rate(self):
        found = self.calibrate("--rate", "0.4", "--held", self.data)
        self.assertEqual(found["target"], 0.4)
        self.assertAlmostEqual(found["rate"], 0.4, delta=0.1)
        self.assertAlmostEqual(sum(found["shares"]), 1)
        for name in ("loss", "rate"):  # of what was stored; the same streams here
            self.assertEqual(found["held_" + name], found[name])
        self.assertEqual(self.stored()["calibration"]["target"], 0.4)
        self.assertAlmostEqual(self.evaluate()["cost"], found["rate"], delta=0.1)
        plain = self.calibrate("--rate", "0.4", "--no-search")
        self.assertTrue(math.isfinite(plain["loss"]))
        self.assertIsNone(plain["held_loss"])
        table = self.succeeds("calibrate", "--model", self.model, "--adapter", self.path("g"),
                              "--chunk", "16", "--min-chunks", "4", "--stream", self.data).stdout
        self.assertIn(b"steps a chunk", table)

    def test_calibrated_to_shares(self):
        found = self.calibrate("--shares", "0.5,0.3,0.2,0", "--no-search")
        self.assertAlmostEqual(found["target"], 0.7)
        self.assertLessEqual(found["rate"], 0.7)

    def test_resumed_on_another_adapter(self):
        common = ["--model", self.model, *self.GATE, "--resume", "--adapter"]
        before = self.stored()
        self.train("gate", "g", *common, self.path("a"))
        self.assertEqual(self.stored(), before)
        # A gate beside the adapter that it is for makes it no other.
        for name in ("ponder.json", "ponder.safetensors"):
            self.write("c/" + name, self.content("a", name))
        for _ in range(2):
            self.train("gate", "c", *common, self.path("c"))
        self.train("adapter", "b", "--model", self.model, *ADAPTER, "--steps", "2")
        os.replace(self.path("b/ponder.safetensors"), self.path("a/ponder.safetensors"))
        message = self.train("gate", "g", *common, self.path("a"), "-q", run=lambda *a: self.fails(3, *a))
        self.assertIn("another adapter", message)

    def test_usage(self):
        self.fails(2, "calibrate", "--adapter", self.path("g"), "-q")
        stream = ["--stream", self.data, "--model", self.model, "--chunk", "16", "-q"]
        message = self.fails(2, "calibrate", *stream, "--adapter", self.path("g"), "--shares", "1,2")
        self.assertIn("--shares", message)
        message = self.fails(2, "calibrate", *stream)
        self.assertIn("adapter", message)
        message = self.fails(3, "calibrate", *stream, "--adapter", self.path("g"), "--min-chunks",
                             "100")
        self.assertIn("100 chunks", message)
        message = self.fails(1, "calibrate", *stream, "--adapter", self.path("a"), "--min-chunks",
                             "4")
        self.assertIn("no gate", message)
