"""What the tests of ponder train share: tiny data and a tiny backbone."""
import json
import os

from tool.harness import Case

BACKBONE = ["--new", "--set", "model.layers=1", "--set", "model.width=16",
            "--set", "model.heads=2", "--set", "model.context=32", "--chunk", "32", "--batch", "2"]
ADAPTER = ["--chunk", "16", "--set", "lora.rank=2", "--batch", "2", "--chunks", "4"]
TIMES = {"tokens_per_second", "ns"}


def source(package, i):
    text = f"def area{i}(w, h):\n    return w * h + {i}\n\nprint(area{i}(3, {i % 7}))\n"
    return {"package": package, "path": f"{i}.py", "text": text}


def json_lines(objects):
    return "".join(json.dumps(item) + "\n" for item in objects).encode()


class TrainingCase(Case):
    def setUp(self):
        super().setUp()
        self.cache = self.path("cache")
        self.data = self.write("data.jsonl", json_lines(
            source(f"p{i // 8}", i) for i in range(48)))

    def train(self, kind, out, *arguments, data=None, run=None, **keywords):
        command = ["train", kind, "--data", data or self.data, "--out", self.path(out), "--cache",
                   self.cache, *arguments]
        return (run or self.succeeds)(*command, **keywords)

    def backbone(self, out="backbone", vocabulary="300"):
        """A model folder."""
        self.train("backbone", out, *BACKBONE, "--vocab", vocabulary, "--steps", "4", "-q")
        return self.path(out)

    def log(self, out):
        with open(os.path.join(self.path(out), "log.jsonl")) as file:
            return [json.loads(line) for line in file]

    def trajectory(self, out):
        """The log without what a clock says."""
        return [{key: value for key, value in line.items() if key not in TIMES}
                for line in self.log(out)]

    def content(self, *path):
        with open(os.path.join(self.folder, *path), "rb") as file:
            return file.read()

    def files(self, out):
        return sorted(os.listdir(self.path(out)))
