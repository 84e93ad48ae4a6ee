"""Languages by the ends of files' names, as the manifest counts them."""

from pathlib import PurePosixPath

_ENDS = {
    "Python": "py pyi pyx", "C": "c h", "C++": "cc cpp cxx hh hpp hxx cu cuh", "Java": "java", "JavaScript": "js jsx mjs",
    "TypeScript": "ts tsx", "Go": "go", "Rust": "rs", "C#": "cs", "PHP": "php", "Ruby": "rb", "Swift": "swift",
    "Kotlin": "kt kts", "Scala": "scala", "Shell": "sh bash zsh", "PowerShell": "ps1", "Perl": "pl pm", "R": "r",
    "Julia": "jl", "Lua": "lua", "Haskell": "hs", "OCaml": "ml mli", "Erlang": "erl", "Elixir": "ex exs",
    "Clojure": "clj", "Lisp": "lisp el", "Scheme": "scm", "Dart": "dart", "Zig": "zig", "Fortran": "f f90 f95",
    "Assembly": "asm s", "SQL": "sql", "Verilog": "v sv", "VHDL": "vhd vhdl", "Objective-C": "m mm",
    "HTML": "html htm", "CSS": "css scss less", "XSLT": "xslt xsl", "XML": "xml xsd svg", "JSON": "json",
    "YAML": "yaml yml", "TOML": "toml", "CMake": "cmake", "Groovy": "groovy gradle", "TeX": "tex", "Protobuf": "proto",
    "Markdown": "md markdown", "reStructuredText": "rst", "Text": "txt",
}  # fmt: skip
_BY_END = {end: language for language, ends in _ENDS.items() for end in ends.split()}
_BY_NAME = {"makefile": "Make", "dockerfile": "Dockerfile", "cmakelists.txt": "CMake"}
PROSE = ("Markdown", "reStructuredText", "Text", "TeX", "other")
"""Languages that the filters for code leave alone."""


def language_of(name: str) -> str:
    """The language of a file by its name; "other" where the name says none."""
    path = PurePosixPath(name.rpartition("#")[0] or name)
    return _BY_NAME.get(path.name.lower()) or _BY_END.get(path.suffix[1:].lower(), "other")
