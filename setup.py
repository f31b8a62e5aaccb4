from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="poa-pretrain",
    version="0.1.0",
    description="Pre-train once, get models of all sizes: POA with elastic kernels over shared weights",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["poa", "poa.*"]), "elastic_kernels", "elastic_kernels.triton_ops"],
    package_dir={"poa": "poa", "elastic_kernels": "kernels/elastic_kernels"},
    package_data={"poa": ["py.typed", "expected/*.json"], "elastic_kernels": ["py.typed", "tuned/*.json"]},
    install_requires=["torch>=2.11", "numpy>=2.1", "pillow>=10.4", "safetensors>=0.4.5", "tqdm>=4.66"],
    extras_require={
        "quickstart": ["scikit-learn", "matplotlib"],
        "plot": ["matplotlib"],
        "evaluate": ["scikit-learn"],
        "detection": ["torchvision", "faster-coco-eval>=1.8"],
        "references": ["pycocotools"],  # that tests compare with
        "timm": ["timm>=1.0.31"],
        "export": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7"],
        "xformers": ["xformers>=0.0.35"],
        "triton": ["triton>=3.6"],
        "parquet": ["pyarrow"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "test": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "setuptools>=77",
            "scikit-learn",
            "matplotlib",
            "triton>=3.6",
            "pyarrow",
            "tensorboard",
        ],
        "stores": ["moto[server]", "s3fs", "datasets"],
        "sanitize": ["pytest", "pytest-xdist"],
        "dev": ["ruff", "mypy"],
    },
    entry_points={"console_scripts": ["poa = poa.__main__:main"]},
)
