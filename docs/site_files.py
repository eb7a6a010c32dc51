"""Hook of mkdocs: every page keeps its path in the repository, so that relative links hold here and on the site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PATTERNS = (
    "*.md",
    "docs/*.md",
    "docs/*.png",
    "ds_configs/*",
    "examples/*",
    "benchmarks/results/*",
    "scmoe_ds/**/*.py",  # pages link to sources
    "tests/**/*.py",
    "pretrain_gpt_scmoe.py",
    "requirements.txt",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces docs/ by the repository's pages and what they link to; keeps the theme's own files."""
    root = Path(config.config_file_path).parent
    found = sorted({path for pattern in PATTERNS for path in root.glob(pattern) if path.is_file()})
    theirs = [file for file in files if not (file.abs_src_path or "").startswith(config.docs_dir)]
    ours = [File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)) for path in found]
    return Files([*theirs, *ours])
