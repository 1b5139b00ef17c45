"""Turns what C++ has no syntax for in a CUDA source into calls of the emulator: launches and
dynamic shared memory.

    translate.py SOURCE OUT
"""
import re
import sys


def matching(text, at, opening, closing):
    """Behind the bracket that closes the one at `at`."""
    depth = 0
    while True:
        depth += (text[at] == opening) - (text[at] == closing)
        at += 1
        if depth == 0:
            return at


def callee_start(text, end):
    """Where the name that ends before `end` begins: a::b<c<d>>."""
    at = len(text[:end].rstrip())
    if text[at - 1] == ">":
        depth = 0
        while True:
            at -= 1
            depth += (text[at] == ">") - (text[at] == "<")
            if depth == 0:
                break
    return re.search(r"[\w:]*$", text[:at]).start()


def launches(text):
    """kernel<<<config>>>(arguments)"""
    while (at := text.find("<<<")) >= 0:
        first = callee_start(text, at)
        config_end = text.index(">>>", at)
        end = matching(text, text.index("(", config_end), "(", ")")
        call = text[first:at].rstrip() + text[config_end + 3 : end]
        config = text[at + 3 : config_end]
        text = f"{text[:first]}::emulator::launch(::emulator::Config({config}), [&] {{ {call}; }}){text[end:]}"
    return text


def dynamic_memory(text):
    """extern __shared__ type name[];"""
    return re.sub(
        r"extern __shared__ (?:__align__\(128\) )?([\w:]+) (\w+)\[\];",
        r"\1 *const \2 = ::emulator::shared_memory<\1>();",
        text,
    )


source, out = sys.argv[1:]
with open(source) as file:
    text = file.read()
with open(out, "w") as file:
    file.write(f'#line 1 "{source}"\n' + dynamic_memory(launches(text)))
