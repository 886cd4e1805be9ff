"""What pyproject.toml cannot say: packages in three folders, and the thread pool's library."""

from setuptools import Extension, find_packages, setup

FOLDERS = {"sparsify": "sparsify", "sparsify.passes": "passes", "sparsify.codegen": "codegen"}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in (name, *(f"{name}.{found}" for found in find_packages(folder)))
    ],
    ext_modules=[
        # A plain shared object, not a Python module: codegen/runtime/pool.py loads it by ctypes.
        Extension(
            "sparsify.codegen.runtime._pool",
            ["codegen/runtime/pool.c"],
            depends=["codegen/runtime/wait.h"],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
)
