"""The installed library, as its users have it: pkg-config, C99, the backend module found
beside the library; and the clients of earlier releases.

Arguments: source root, build root, libponder.so.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE, BUILD, LIBPONDER = sys.argv[1:4]
TINY = os.path.join(SOURCE, "tests", "data", "gpt2_tiny")
CODE10M = os.path.join(SOURCE, "tools", "models", "code-10m")


def run(*command, **options):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          **options)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}\nexit status {done.returncode}\n{done.stdout}")
    return done.stdout


def find(folder, name):
    return [os.path.join(path, name) for path, folders, files in os.walk(folder)
            if name in files or name in folders]


class Installed(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix="ponder-install-")
        cls.addClassCleanup(shutil.rmtree, cls.root)
        run("meson", "install", "-C", BUILD, "--no-rebuild", "--destdir", cls.root)
        cls.package = cls.only("ponder.pc")
        cls.library_dir = os.path.dirname(cls.only("libponder.so.0"))
        cls.environment = {
            "PATH": os.environ["PATH"],
            "LD_LIBRARY_PATH": cls.library_dir,
            "PKG_CONFIG_LIBDIR": os.path.dirname(cls.package),
            "PKG_CONFIG_SYSROOT_DIR": cls.root,
        }

    @classmethod
    def only(cls, name):
        paths = find(cls.root, name)
        assert len(paths) == 1, f"{name}: {paths}"
        return paths[0]

    def client(self, source):
        """Compiles a C99 source with what pkg-config says and nothing else."""
        flags = run("pkg-config", "--cflags", "--libs", "ponder", env=self.environment).split()
        program = os.path.join(self.root, os.path.basename(source)[:-2])
        run("cc", "-std=c99", "-Wall", "-Wextra", "-Werror", source, *flags, "-o", program)
        return program

    def test_example_adapts_to_a_text(self):
        source = os.path.join(SOURCE, "tests", "examples", "adapt.c")
        if not os.path.exists(source):
            self.skipTest("tests/examples/adapt.c is absent")
        text = os.path.join(self.root, "text")
        with open(text, "w") as file:
            for i in range(400):
                file.write(f"def add_{i}(left, right):\n    return left + right + {i}\n\n")
        output = run(self.client(source), CODE10M, text, env=self.environment)
        self.assertRegex(output, r"\d")

    def test_backend_module_is_beside_the_library(self):
        paths = find(self.root, "ponder-cpu.so")
        if not paths:
            self.skipTest("the cpu module was not built")
        folder = os.path.join(self.library_dir, "ponder-1")
        self.assertEqual(paths, [os.path.join(folder, "ponder-cpu.so")])
        said = run("pkg-config", "--variable=backenddir", "ponder", env=self.environment).strip()
        self.assertEqual(os.path.basename(said), "ponder-1")

    def test_library_finds_its_backend_module(self):
        module = find(self.root, "ponder-cpu.so")
        if not module:
            self.skipTest("the cpu module was not built")
        program = self.client(os.path.join(HERE, "backends.c"))
        self.assertIn(module[0], run(program, env=self.environment).splitlines())

    def test_tool_lists_the_installed_module(self):
        tools = [path for path in find(self.root, "ponder")
                 if os.path.isfile(path) and os.access(path, os.X_OK)]
        if not tools:
            self.skipTest("the tool was not built")
        module = find(self.root, "ponder-cpu.so")
        output = run(tools[0], "backends", env=self.environment)
        self.assertIn("reference", output)
        if module:
            self.assertIn("cpu", output)


class OldClients(unittest.TestCase):
    """Programs built against the header of a release, run with today's library."""


def add_client_test(release):
    folder = os.path.join(HERE, "clients", release)

    def test(self):
        with tempfile.TemporaryDirectory() as build:
            program = os.path.join(build, "client")
            run("cc", "-std=c99", "-D_POSIX_C_SOURCE=200809L", "-I" + folder,
                os.path.join(folder, "client.c"), LIBPONDER,
                "-Wl,-rpath," + os.path.dirname(LIBPONDER), "-o", program)
            run(program, TINY)

    setattr(OldClients, "test_" + release.replace(".", "_"), test)


for release in sorted(os.listdir(os.path.join(HERE, "clients"))):
    add_client_test(release)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
