"""ponder train: what it writes, resuming, interrupts, errors."""
import json
import os
import resource
import signal
import socket
import subprocess
import time

from tool import harness
from tool.harness import ponder
from tool.test_terminal import read_terminal
from tool.training import ADAPTER, BACKBONE, TrainingCase

import pty


class Train(TrainingCase):
    FIELDS = ["step", "flags", "tokens", "loss", "loss_first", "reconstruction", "gradient_norm",
              "learning_rate", "inner_rate", "cost", "temperature", "tokens_per_second", "flops",
              "ns"]

    def test_backbone_from_nothing(self):
        result = self.train("backbone", "b", *BACKBONE, "--vocab", "300", "--steps", "20", "--checkpoint-every", "6",
                            "--keep", "2", "--json", "--set", "train.lr=1e-2")
        found = json.loads(result.stdout)
        self.assertEqual((found["steps"], found["complete"], found["kind"]), (20, True, "backbone"))
        self.assertEqual(self.files("b"), ["config.json", "initial", "log.jsonl",
                                           "model.safetensors", "step-18.ckpt", "step-20.ckpt",
                                           "tokenizer.json"])
        log = self.log("b")
        self.assertEqual([line["step"] for line in log], list(range(1, 21)))
        self.assertEqual(list(log[0]), self.FIELDS)
        self.assertLess(log[-1]["loss"], log[0]["loss"])
        self.assertEqual(found["loss"], log[-1]["loss"])
        # It is a model, which has fewer positions than a chunk has by default.
        shown = self.object_of("info", "--model", self.path("b"))
        self.assertEqual((shown["model"]["context"], "memory_plan" in shown), (32, False))
        self.assertIn("memory_plan",
                      self.object_of("info", "--model", self.path("b"), "--chunk", "32"))
        self.fails(2, "info", "--model", self.path("b"), "--plan-only")
        # A better one than the first.
        losses = [self.object_of("eval", "--stream", self.data, "--model", self.path(model),
                                 "--chunk", "32", "--adapter", "none", "--min-chunks", "2")["loss"]
                  for model in ("b/initial", "b")]
        self.assertLess(losses[1], losses[0])
        model = self.object_of("info", "--model", self.path("b"), "--chunk", "16")["model"]
        self.assertEqual((model["vocabulary"], model["end_of_text"], model["width"]), (300, 0, 16))

    def test_adapter_and_its_use(self):
        model = self.backbone()
        self.train("adapter", "a", "--model", model, *ADAPTER, "--steps", "6", "--valid-share",
                   "0.5", "--valid-every", "3")
        self.assertEqual(self.files("a"), ["log.jsonl", "ponder.json", "ponder.safetensors",
                                           "step-6.ckpt"])
        log = self.log("a")
        self.assertEqual([line["step"] for line in log], list(range(0, 7)))
        self.assertEqual([line["step"] for line in log if "valid_loss" in line], [0, 3, 6])
        self.assertGreater(log[-1]["valid_chunks"], 0)
        for command in (["run", self.data], ["eval", "--stream", self.data]):
            found = self.object_of(*command, "--model", model, "--adapter", self.path("a"),
                                   "--chunk", "16", "--context", "16")
            self.assertIn(self.path("a"), json.dumps(found["options"]))

    def test_validation_is_what_eval_measures(self):
        model = self.backbone()
        valid = self.write("valid.jsonl", self.content("data.jsonl").replace(b': "p', b': "v'))
        for out, extra, policy in [("a", [], "always"), ("s", ["--set", "train.inner=0"], "skip")]:
            self.train("adapter", out, "--model", model, *ADAPTER, "--steps", "4", "--valid",
                       valid, *extra, "--set", "train.lr=0.05")
            found = self.object_of("eval", "--stream", valid, "--model", model, "--adapter",
                                   self.path(out), "--policy", policy, "--chunk", "16",
                                   "--max-chunks", "16", "--min-chunks", "2")
            self.assertAlmostEqual(found["loss"], self.log(out)[-1]["valid_loss"], 12)
            self.assertEqual(found["cost"], self.log(out)[-1]["valid_cost"])
        self.train("backbone", "b", "--model", model, "--steps", "3", "--valid", valid,
                   "--chunk", "32")
        found = self.object_of("eval", "--stream", valid, "--model", self.path("b"), "--adapter",
                               "none", "--chunk", "32", "--max-chunks", "16", "--min-chunks", "2")
        self.assertAlmostEqual(found["loss"], self.log("b")[-1]["valid_loss"], 12)

    def test_resume_is_exact(self):
        model = self.backbone()
        common = ["--model", model, *ADAPTER, "--checkpoint-every", "4", "--set", "train.steps=12",
                  "--valid-share", "0.3", "--valid-every", "5"]
        self.train("adapter", "whole", *common)
        process = self.start("adapter", "parts", *common)
        for seconds in (0.02, 0.05, 0.07):
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
            process = self.start("adapter", "parts", *common, "--resume")
        process.communicate()
        self.assertEqual(process.returncode, 0)
        process.stdout.close()
        process.stderr.close()
        self.assertEqual(self.trajectory("parts"), self.trajectory("whole"))
        for file in ["step-12.ckpt", "ponder.safetensors"]:
            self.assertEqual(self.content("parts", file), self.content("whole", file))
        # Nothing is left to do: the same again.
        before = self.content("parts", "log.jsonl")
        self.train("adapter", "parts", *common, "--resume")
        self.assertEqual(self.content("parts", "log.jsonl"), before)

    def together(self, world, kind, out, *arguments, names=("WORLD_SIZE", "RANK"), kept=False):
        """Processes as a launcher starts them, one that may keep the port; what the first prints."""
        launcher, beside = socket.socket(), socket.socket()
        # Below the ports that connections get; the one beside it is free as well.
        for port in range(20000 + os.getpid() % 5000 * 2, 32766, 2):
            try:
                launcher.bind(("127.0.0.1", port))
                beside.bind(("127.0.0.1", port + 1))
                break
            except OSError:
                launcher.close()
                launcher = socket.socket()
        beside.close()
        self.addCleanup(launcher.close)
        temporary = self.path("temporary")
        os.makedirs(temporary, exist_ok=True)
        common = dict(os.environ, MASTER_ADDR="127.0.0.1", TMPDIR=temporary,
                      MASTER_PORT=str(launcher.getsockname()[1]))
        if kept:
            launcher.listen()
            common["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        else:
            launcher.close()
        processes = [self.start(kind, out, *arguments,
                                env=dict(common, **dict(zip(names, (str(world), str(rank))))))
                     for rank in range(world)]
        # One that fails leaves the others waiting.
        end = time.monotonic() + 120
        while any(process.poll() is None for process in processes):
            if time.monotonic() > end or any(process.poll() for process in processes):
                for process in processes:
                    process.kill()
            time.sleep(0.01)
        found = [process.communicate() for process in processes]
        self.assertEqual([process.returncode for process in processes], [0] * world,
                         [errors for _, errors in found])
        self.assertEqual([stdout for stdout, _ in found[1:]], [b""] * (world - 1))
        self.assertEqual(os.listdir(temporary), [])
        return found[0][0]

    def test_processes_train_together(self):
        model = self.backbone()
        for kind, common in [
                ("adapter", ["--model", model, *ADAPTER]),
                ("backbone", [*BACKBONE, "--vocab", "300"])]:
            common[common.index("--batch") + 1] = "4"
            common += ["--set", "train.steps=6", "--checkpoint-every", "3",
                       "--valid-share", "0.3", "--valid-every", "3", "--json"]
            alone = json.loads(self.train(kind, kind + "-alone", *common).stdout)
            shared = json.loads(self.together(2, kind, kind + "-shared", *common, kept=True))
            self.assertEqual(self.files(kind + "-shared"), self.files(kind + "-alone"))
            self.assertEqual(alone["steps"], shared["steps"])
            self.assertAlmostEqual(alone["loss"], shared["loss"], 3)
            for a, b in zip(self.log(kind + "-alone"), self.log(kind + "-shared")):
                self.assertEqual((a["step"], a.get("tokens")), (b["step"], b.get("tokens")))
            # Another number of processes goes on from what they left.
            os.unlink(self.path(kind + "-shared/step-6.ckpt"))
            for file in os.listdir(self.path(kind + "-shared")):
                if file.startswith("ponder.") or file == "model.safetensors":
                    os.unlink(self.path(f"{kind}-shared/{file}"))
            resumed = json.loads(self.together(
                3, kind, kind + "-shared", *common, "--resume",
                names=("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")))
            self.assertAlmostEqual(alone["loss"], resumed["loss"], 3)
            self.assertEqual(self.files(kind + "-shared"), self.files(kind + "-alone"))

    def start(self, kind, out, *arguments, **keywords):
        command = [harness.TOOL, "train", kind, "--data", self.data, "--out", self.path(out),
                   "--cache", self.cache, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE,
                                **{"stderr": subprocess.PIPE, **keywords})

    def test_interrupt_saves(self):
        model = self.backbone()
        common = ["--model", model, *ADAPTER, "--checkpoint-every", "1000000", "--steps", "100000"]
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        process = self.start("adapter", "a", *common, stderr=slave,
                             env=dict(os.environ, TERM="xterm"))
        os.close(slave)
        seen = read_terminal(master, until=b"ETA")
        log = self.path("a/log.jsonl")
        while not (os.path.exists(log) and os.path.getsize(log)) and process.poll() is None:
            time.sleep(0.01)  # until there is a step to save
        process.send_signal(signal.SIGINT)
        seen += read_terminal(master)
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130)
        self.assertRegex(seen, rb"/100,000  loss .*tok/s  ETA")
        self.assertIn(b"--resume goes on from", seen)
        steps = self.log("a")[-1]["step"]
        self.assertIn(f"step-{steps}.ckpt", self.files("a"))
        self.assertNotIn("ponder.json", self.files("a"))

    def test_another_run_in_the_folder_is_refused(self):
        model = self.backbone()
        self.train("adapter", "a", "--model", model, *ADAPTER, "--steps", "2")
        message = self.train("adapter", "a", "--model", model, *ADAPTER, "--steps", "2", "-q",
                             run=lambda *a: self.fails(2, *a))
        self.assertIn("--resume", message)
        self.train("adapter", "a", "--model", model, *ADAPTER, "--set", "train.steps=2e0", "--resume",
                   "--set", "train.lr=0.0010")
        # Other data and other options are no continuation.
        other = self.write("other.jsonl", self.content("data.jsonl").replace(b"area", b"field"))
        for data, extra in [(other, []), (self.data, ["--seed", "3"]),
                            (self.data, ["--set", "lora.rank=3"])]:
            result = self.train("adapter", "a", "--model", model, *ADAPTER, "--steps", "2",
                                "--resume", "-q", *extra, data=data, run=ponder)
            self.assertIn(result.returncode, (2, 3), result.stderr)
            self.assertIn(b"step-2.ckpt", result.stderr)
            self.assertNotIn(b"last checkpoint", result.stderr)
        self.assertIn(b"option 'lora.rank' was \"2\", and is now \"3\"", result.stderr)

    def test_two_processes_in_one_folder(self):
        model = self.backbone()
        common = ["--model", model, *ADAPTER, "--steps", "1000000"]
        first = self.start("adapter", "a", *common)
        while not os.path.exists(self.path("a/log.jsonl")):
            pass
        second = self.start("adapter", "a", *common, "--resume", "-q")
        _, message = second.communicate(timeout=60)
        first.kill()
        first.communicate()
        self.assertEqual(second.returncode, 3)
        self.assertIn(b"another process trains here", message)

    def test_file_size_limit_leaves_the_checkpoint(self):
        model = self.backbone()
        common = ["--model", model, *ADAPTER, "--checkpoint-every", "500", "--steps", "2000"]
        self.train("adapter", "whole", *common)
        process = self.start("adapter", "a", *common)
        while not os.path.exists(self.path("a/step-500.ckpt")):
            pass
        process.kill()
        process.communicate()
        latest = max(int(name[5:-5]) for name in self.files("a") if name.endswith(".ckpt"))
        checkpoint = f"step-{latest}.ckpt"
        before = self.content("a", checkpoint)
        for limit, what in [(len(before) - 100, ".ckpt"), (1, "log.jsonl")]:
            result = subprocess.run(process.args + ["--resume"], stderr=subprocess.PIPE, preexec_fn=(
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
            self.assertEqual(result.returncode, 3, result.stderr)
            message = result.stderr.decode().splitlines()[-1]
            self.assertIn("File too large", message)
            self.assertIn(what, message)
            self.assertIn(f"the last checkpoint is {self.path('a')}/{checkpoint}", message)
            self.assertEqual(self.content("a", checkpoint), before)
            self.assertEqual([n for n in self.files("a") if n.endswith((".tmp", ".part"))], [])
        self.train("adapter", "a", *common, "--resume")
        last = "step-2000.ckpt"
        self.assertEqual(self.content("a", last), self.content("whole", last))
        self.assertEqual(self.trajectory("a"), self.trajectory("whole"))

    def test_usage(self):
        model = self.backbone()
        for arguments, what in [
                (["adapter", "--new"], "--new is for backbones"),
                (["backbone"], "either --new, or --model"),
                (["backbone", "--model", model, "--new"], "either --new, or --model"),
                (["gate"], "--adapter DIR"),
                (["adapter", "--adapter", "none"], "nothing to train"),
                (["adapter", "--valid", self.data, "--valid-share", "0.1"], "either --valid"),
                (["adapter", "--set", "train.steps=x"], "train.steps"),
                (["wheel"], "not in {adapter,gate,backbone}")]:
            with self.subTest(arguments=arguments):
                message = self.train(arguments[0], "out", *arguments[1:],
                                     run=lambda *a: self.fails(2, *a))
                self.assertIn(what, message)
        self.fails(2, "train", "adapter", "--out", self.path("out"))
        self.fails(2, "train", "adapter", "--data", self.data)

    def test_too_little_data(self):
        model = self.backbone()
        small = self.write("small.jsonl", b'{"text": "x"}\n')
        for kind in (["adapter", *ADAPTER], ["backbone"]):
            message = self.train(kind[0], "out", "--model", model, *kind[1:], "-q", data=small,
                                 run=lambda *a: self.fails(3, *a))
            self.assertIn("training data", message)
