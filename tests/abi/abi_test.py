"""The binary interface: headers, symbols, layout, what the libraries may pull in.

Arguments: source root, libponder.so, ponder-cpu.so ("" if it was not built), "assertions" if
they are compiled in.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from header import HEADERS, Header

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE, LIBPONDER, CPU_MODULE = sys.argv[1:4]
ASSERTIONS = sys.argv[4:] == ["assertions"]
INCLUDE = os.path.join(SOURCE, "include")
WARNINGS = ["-pedantic-errors", "-Wall", "-Wextra", "-Werror"]

# Hosts do not expect a library to end their process, write to their terminal, or change
# process-wide settings.
FORBIDDEN = set("""abort exit _exit _Exit quick_exit
    printf vprintf puts putchar putc fputs fputc fprintf vfprintf fwrite perror
    __printf_chk __vprintf_chk __fprintf_chk __vfprintf_chk stdout stderr
    signal sigaction setenv unsetenv putenv setlocale srand""".split())
FORBIDDEN |= set() if ASSERTIONS else {"__assert_fail"}
NEEDED = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}


def run(*command, **options):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          **options)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def exported(library):
    """Names, and the version nodes they carry."""
    rows = [line.split() for line in run("nm", "-D", "--defined-only", library).splitlines()]
    symbols = [row[2].partition("@") for row in rows if row[1] != "A"]
    return {name for name, _, _ in symbols}, {version.lstrip("@") for _, _, version in symbols}


def dynamic(library, tag):
    return set(re.findall(rf"\({tag}\).*\[(.*)\]", run("readelf", "-dW", library)))


class Headers(unittest.TestCase):
    """Each header alone, and twice, in every language version that clients use."""


def add_header_test(header, compiler, standard):
    def test(self):
        if not shutil.which(compiler):
            self.skipTest(f"no {compiler}")
        language = "c++" if "++" in standard else "c"
        run(compiler, *WARNINGS, f"-std={standard}", "-I" + INCLUDE, "-fsyntax-only",
            "-x", language, "-", input=f"#include <{header}>\n" * 2)

    name = re.sub(r"\W", "_", f"test_{header}_{compiler}_{standard.replace('+', 'p')}")
    setattr(Headers, name, test)


for header in HEADERS:
    for compiler in ("gcc", "clang"):
        for standard in ("c99", "c11", "c++11", "c++20"):
            add_header_test(header, compiler, standard)


class Declarations(unittest.TestCase):
    def test_every_function_resolves(self):
        functions = Header(INCLUDE, "ponder/ponder.h").functions
        self.assertGreater(len(functions), 30)
        table = ", ".join(f"(function){name}" for name in functions)
        with tempfile.TemporaryDirectory() as folder:
            program = os.path.join(folder, "table")
            run("gcc", *WARNINGS, "-std=c99", "-I" + INCLUDE, "-x", "c", "-", "-x", "none",
                LIBPONDER, "-Wl,-rpath," + os.path.dirname(LIBPONDER), "-o", program,
                input="#include <ponder/ponder.h>\n"
                      "typedef void (*function)(void);\n"
                      f"function table[] = {{{table}}};\n"
                      "int main(void) {\n"
                      "    for (size_t i = 0; i < sizeof table / sizeof *table; ++i)\n"
                      "        if (!table[i]) return 1;\n"
                      "    return 0;\n}\n")
            run(program)

    def test_every_function_is_in_the_symbol_list(self):
        functions = Header(INCLUDE, "ponder/ponder.h").functions
        self.assertEqual(sorted(functions), symbol_list())

    def test_layout(self):
        run("gcc", *WARNINGS, "-std=c11", "-I" + INCLUDE, "-fsyntax-only",
            os.path.join(HERE, "layout.c"))

    def test_layout_knows_everything_declared(self):
        with open(os.path.join(HERE, "layout.c")) as file:
            known = set(re.findall(r"^IS\((.*), -?\d+\);$", file.read(), flags=re.M))
        for name in HEADERS:
            header = Header(INCLUDE, name)
            for struct, fields in header.structs.items():
                self.assertIn(f"sizeof({struct})", known)
                for field in fields:
                    self.assertIn(f"offsetof({struct}, {field})", known)
            self.assertLessEqual(set(header.constants), known)


def symbol_list():
    with open(os.path.join(HERE, "symbols.txt")) as file:
        return file.read().split()


class Library(unittest.TestCase):
    def test_exports_the_symbol_list(self):
        names, _ = exported(LIBPONDER)
        self.assertEqual(sorted(names), symbol_list())
        self.assertEqual([name for name in names if not name.startswith("ponder_")], [])

    def test_version_node(self):
        _, versions = exported(LIBPONDER)
        self.assertEqual(versions, {"PONDER_0"})

    def test_soname(self):
        self.assertEqual(dynamic(LIBPONDER, "SONAME"), {"libponder.so.0"})

    def test_needs_only_the_base_system(self):
        self.assertLessEqual(dynamic(LIBPONDER, "NEEDED"), NEEDED)

    def test_calls_nothing_that_surprises_the_host(self):
        rows = run("nm", "-D", "--undefined-only", LIBPONDER).splitlines()
        names = {row.split()[-1].partition("@")[0] for row in rows}
        self.assertEqual(names & FORBIDDEN, set())
        self.assertEqual([name for name in names if name.startswith(("_ZSt4c", "_ZNSo"))], [])

    def test_no_static_initialisers(self):
        check_no_static_initialisers(self, LIBPONDER)


@unittest.skipUnless(CPU_MODULE, "the cpu module was not built")
class CpuModule(unittest.TestCase):
    def test_exports_one_function(self):
        names, _ = exported(CPU_MODULE)
        self.assertEqual(names, {"ponder_backend_query_v1"})

    def test_no_static_initialisers(self):
        # Code of a higher instruction set may not run before probe has looked at the processor.
        check_no_static_initialisers(self, CPU_MODULE)


def check_no_static_initialisers(test, library):
    """.init_array and .fini_array hold the compiler's own entry and nothing else."""
    sections = dict(re.findall(r"\] (\.\w+)\s+\w+\s+\w+ \w+ (\w+) ",
                               run("readelf", "-SW", library)))
    # The names tell the source file.
    test.assertEqual(re.findall(r" t (_GLOBAL__sub_I_\S+)", run("nm", library)), [])
    test.assertEqual(int(sections[".init_array"], 16), 8)
    test.assertEqual(int(sections[".fini_array"], 16), 8)
    for legacy in (".preinit_array", ".ctors", ".dtors"):
        test.assertNotIn(legacy, sections)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
