"""Training that is killed again and again ends where training that is left alone does."""
import os
import random
import subprocess
import time

from tool import harness
from tool.training import ADAPTER, BACKBONE, TrainingCase


class Durability(TrainingCase):
    KILLS = 105  # of each kind

    def survives(self, kind, steps, common, results):
        common = [*common, "--steps", str(steps), "--checkpoint-every", "7", "-q"]
        whole = self.seconds(kind, "whole", *common)
        start = self.seconds(kind, "whole", *common, "--resume")  # nothing is left to do
        command = [harness.TOOL, "train", kind, "--data", self.data, "--out", self.path("killed"),
                   "--cache", self.cache, *common]
        # So that each process goes on about as far as the last one has to be from the first.
        longest = start + 2.5 * max(whole - start, 0.2) / self.KILLS
        chance = random.Random(11)
        seen, ends = set(), 0
        for _ in range(self.KILLS):
            process = subprocess.Popen(command + ["--resume"], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.PIPE)
            time.sleep(chance.uniform(0.3 * start, longest))
            process.kill()
            _, message = process.communicate()
            if process.returncode != -9:
                self.assertEqual(process.returncode, 0, message)
                ends += 1
            if os.path.isdir(self.path("killed")):
                seen |= {name for name in self.files("killed") if name.endswith(".ckpt")}
        self.assertGreater(len(seen), 5, "the kills came too early to matter")
        self.assertLess(ends, self.KILLS * 0.9, "the kills came too late to matter")
        self.succeeds(*command[1:], "--resume")
        for result in [f"step-{steps}.ckpt", *results]:
            self.assertEqual(self.content("killed", result), self.content("whole", result), result)
        self.assertEqual(self.trajectory("killed"), self.trajectory("whole"))
        self.assertEqual(self.files("killed"), self.files("whole"))  # and nothing else is left

    def seconds(self, *arguments):
        start = time.monotonic()
        self.train(*arguments)
        return time.monotonic() - start

    def test_adapter(self):
        model = self.backbone()
        self.survives("adapter", 1500, ["--model", model, *ADAPTER, "--valid-share", "0.3",
                                        "--valid-every", "25"],
                      ["ponder.json", "ponder.safetensors"])

    def test_backbone_from_nothing(self):
        self.survives("backbone", 1500, [*BACKBONE, "--vocab", "300", "--valid-share", "0.3", "--valid-every", "50"],
                      ["config.json", "model.safetensors", "tokenizer.json"])
