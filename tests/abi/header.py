"""What the public headers declare: functions, struct fields, enum constants.

Run as a program it prints layout.c; see there for when that is allowed.
"""
import os
import re
import subprocess
import sys
import tempfile

HEADERS = ("ponder/ponder.h", "ponder/backend.h", "ponder/gate_rule.h")


class Header:
    def __init__(self, include_dir, name):
        with open(os.path.join(include_dir, name)) as file:
            text = file.read()
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
        text = re.sub(r"^[ \t]*#.*$", " ", text, flags=re.M)
        self.functions = re.findall(r"PONDER_API\s[^;(]*?(\w+)\s*\(", text)
        self.structs = {
            name: [field for line in body.split(";") for field in _declared(line)]
            for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\n\} \w+;", text, flags=re.S)
        }
        self.constants = [
            constant
            for body in re.findall(r"enum \w+ \{(.*?)\}", text, flags=re.S)
            for constant in re.findall(r"(\w+)\s*=", body)
        ]


def _declared(line):
    """Names declared by one struct line: `uint64_t a, b` or a function pointer."""
    pointer = re.search(r"\(\*(\w+)\)\(", line)
    if pointer:
        return [pointer.group(1)]
    parts = line.split(",")
    return [re.search(r"(\w+)\s*(\[\w+\])?\s*$", part).group(1) for part in parts if part.strip()]


def layout(include_dir):
    """The text of layout.c with the numbers of this compiler."""
    wanted = []
    for name in HEADERS:
        header = Header(include_dir, name)
        for struct, fields in header.structs.items():
            wanted += ["", f"sizeof({struct})"]
            wanted += [f"offsetof({struct}, {field})" for field in fields]
        wanted += ["", *header.constants]
    includes = "".join(f"#include <{name}>\n" for name in HEADERS)
    prints = "".join(f'    printf("%ld\\n", (long)({what}));\n' for what in wanted if what)
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "layout")
        subprocess.run(["cc", "-std=c11", f"-I{include_dir}", "-x", "c", "-", "-o", program],
                       input=f"{includes}#include <stdio.h>\nint main(void) {{\n{prints}}}\n",
                       text=True, check=True)
        numbers = subprocess.check_output([program], text=True).split()
    numbers = iter(numbers)
    lines = [f"IS({what}, {next(numbers)});" if what else "" for what in wanted]
    return (
        "/* The binary layout of the public headers on LP64 systems. A number that changes breaks\n"
        " * programs built before: after a release, lines may only be added, and sizes only grow.\n"
        " * Printed by header.py. */\n"
        f"{includes}\n"
        "#define IS(what, number) _Static_assert((what) == (number), #what)\n"
        + "\n".join(lines) + "\n")


if __name__ == "__main__":
    print(layout(sys.argv[1]), end="")
