"""ponder report: the page over training logs."""
import json
import math
import re

from tool.harness import Case
from tool.test_page import PageReader


def log_lines(steps, start=3.0):
    lines = [{"step": 0, "valid_loss": start}]
    for i in range(1, steps + 1):
        line = {"step": i, "flags": 0, "tokens": 100, "loss": start - math.log(i) / 10,
                "gradient_norm": 1 / i, "learning_rate": 1e-3 * i, "inner_rate": 3e-3, "cost": 1.0,
                "temperature": None, "tokens_per_second": 1000.0, "flops": 1, "ns": 100000000}
        if i % 10 == 0:
            line["valid_loss"] = start - math.log(i) / 9
        lines.append(line)
    return "".join(json.dumps(line) + "\n" for line in lines)


class Report(Case):
    def page(self, *logs):
        target = self.path("page.html")
        result = self.succeeds("report", *logs, "--out", target)
        self.assertIn(b"wrote", result.stderr)
        with open(target, encoding="utf-8") as file:
            page = file.read()
        reader = PageReader()
        reader.feed(page)
        self.assertEqual((reader.errors, reader.open), ([], []))
        self.assertNotRegex(page, r"https?:|@import|nan|inf")
        return page

    def test_one_log(self):
        page = self.page(self.write("run1/log.jsonl", log_lines(60)))
        for part in ["Loss (nats/token)", "Update rate", "Inner step size", "Learning rate",
                     "Gradient norm", "Tokens per second", "run1", "</svg>"]:
            self.assertIn(part, page)
        self.assertNotIn("Temperature", page)  # no value at all
        self.assertEqual(page.count("<circle"), 7)
        self.assertIn(f"<td>{3 - math.log(60) / 9:.4f}</td>", page)

    def test_several_logs_share_the_charts(self):
        names = [self.write(f"{name}/log.jsonl", log_lines(steps, 3 + steps / 100))
                 for name, steps in [("a", 30), ("b<i>", 60)]]
        names.append(self.write("third.jsonl", log_lines(5)))
        page = self.page(*names)
        one = self.page(names[0])
        self.assertEqual(page.count("<svg"), one.count("<svg"))
        for part in ["a</td>", "b&lt;i&gt;</td>", "third.jsonl</td>", "k0 curve", "k1 curve",
                     "k2 curve"]:
            self.assertIn(part, page)

    def test_same_names_are_told_apart(self):
        names = [self.write(f"{name}/run/log.jsonl", log_lines(3)) for name in "ab"]
        page = self.page(*names)
        for name in names:
            self.assertIn(name + "</td>", page)

    def test_a_log_that_is_being_written(self):
        page = self.page(self.write("log.jsonl", log_lines(30) + '{"step": 31, "lo'))
        self.assertRegex(page, r"<td>30</td>")

    def test_long_logs_stay_small(self):
        page = self.page(self.write("log.jsonl", log_lines(20000)))
        self.assertLess(len(page), 400000)

    def test_what_is_no_log(self):
        for content, what in [("", "no step"), ("x\n", ":1: "), ('{"a": 1}\n' * 2, '"step"'),
                              (log_lines(3) + "x\n" + log_lines(3), ":5: ")]:
            message = self.fails(3, "report", self.write("log.jsonl", content), "--out",
                                 self.path("p.html"), "-q")
            self.assertIn("log.jsonl", message)
            self.assertIn(what, message)
        self.fails(3, "report", self.path("none"), "--out", self.path("p.html"))
        self.fails(2, "report", "--out", self.path("p.html"))
