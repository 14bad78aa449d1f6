"""
How bash, zsh and fish ask for completion, and how they are answered so that what they insert is one word with that value.

Names of files, disks and VMs are anybody's: what is inserted is quoted, by ourselves for bash and by the other shells
themselves, and a name that no terminal can show is not offered. Click's own scripts do neither, and split words at commas and
spaces; who has one of those installed is offered what needs no quotes.
"""

import os
import re
from typing import NamedTuple

from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete, add_completion_class

_BASH = """\
%(complete_func)s() {
    local answer
    COMPREPLY=()
    while IFS= read -r answer; do
        case $answer in
            dir,*) compopt -o dirnames ;;
            file,*) compopt -o default ;;
            open,*) compopt -o nospace; COMPREPLY+=("${answer#*,}") ;;
            plain,*) COMPREPLY+=("${answer#*,}") ;;
        esac
    done < <(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_BREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_ZSH = """\
#compdef %(prog_name)s
%(complete_func)s() {
    local type value note
    local -a answers values notes
    answers=("${(@f)$(env COMP_ARGS="${(F)${(@Q)words[2,CURRENT-1]}}" COMP_WORD="${(Q)PREFIX}" \\
        %(complete_var)s=zsh_complete "${(Q)words[1]}" 2>/dev/null)}")
    for type value note in "${answers[@]}"; do
        case $type in
            dir) compset -P '--*='; _path_files -/ ;;
            file) compset -P '--*='; _path_files -f ;;
            open) compadd -U -V names -S '' -- "$value" ;;
            plain) values+=("$value"); notes+=("$value${note:#_}") ;;
        esac
    done
    (( $#values )) && compadd -U -V names -l -d notes -a values
}
if [[ $funcstack[1] == _%(prog_name)s ]]; then  # a file in a folder of $fpath, each time that it is called
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""

_FISH = """\
function %(complete_func)s
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l answers (env COMP_ARGS=(string join \\n -- $words[2..] | string collect) COMP_WORD=$word \\
        %(complete_var)s=fish_complete $words[1] 2>/dev/null)
    for answer in $answers
        set -l parts (string split -m 1 , -- $answer)
        switch $parts[1]
            case dir
                __fish_complete_directories $word
            case file
                __fish_complete_path $word
            case open plain
                echo $parts[2]
        end
    end
end
complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]-]+")
_NO_QUOTES = re.compile(r"[A-Za-z0-9_@%+=:,./-]")
_SPACES = " \t\n"


def shown(item: "CompletionItem[str]") -> str:
    """What stands beside an offer."""
    return "".join(letter if letter.isprintable() else "?" for letter in item.help or "")


def offers(items: "list[CompletionItem[str]]", word: str) -> "list[CompletionItem[str]]":
    """Those that a terminal can show, as whole words: click leaves away the option in ``--option=VALUE``."""
    option, equals, _ = word.partition("=")
    before = f"{option}=" if equals and option.startswith("--") else ""
    found = []
    for item in items:
        value = f"{before}{item.value}" if item.type == "plain" else item.value
        kind = "open" if item.type == "plain" and value.endswith("=") else item.type
        if value.isprintable():
            found.append(CompletionItem(value, kind, item.help))
    return found


def words_of(given: str) -> list[str]:
    """The words that our scripts for zsh and fish hand over, a line each."""
    return given.split("\n") if given else []


class Bash(BashComplete):
    """It inserts as it is what it gets, in the place of what stands behind the last break of the word, or quote."""

    source_template = _BASH

    @staticmethod
    def _check_version() -> None:
        """Not asked: bash 4.4 is ten years old."""

    def complete(self) -> str:
        """An offer a line, quoted to be a part of the word that is being typed."""
        line = os.environ.get("COMP_LINE")
        if line is None:  # click's script
            args, word = self.get_completion_args()
            plain = [
                item for item in self.get_completions(args, word) if _PLAIN.fullmatch(item.value) or not item.value
            ]
            return "\n".join(f"{item.type},{item.value}" for item in plain)
        *before, raw = raw_words(line)
        word = value_of(raw)
        items = offers(self.get_completions([value_of(one) for one in before[1:]], word), word)
        kept, quote = left_alone(raw, os.environ.get("COMP_BREAKS", _SPACES))
        lines = []
        for item in items:
            if item.type in ("dir", "file"):
                lines.append(f"{item.type},")
            elif item.value.startswith(kept) and quote != "$'":
                lines.append(f"{item.type},{quoted(item.value[len(kept) :], quote)}")
        return "\n".join(lines)


class Zsh(ZshComplete):
    """It quotes by itself; three lines an offer."""

    source_template = _ZSH

    def complete(self) -> str:
        """Type, value and a note, a line each."""
        word = os.environ.get("COMP_WORD", "")
        items = offers(self.get_completions(words_of(os.environ.get("COMP_ARGS", "")), word), word)
        return "\n".join(
            f"{item.type}\n{item.value or '_'}\n{'  ' + shown(item) if item.help else '_'}" for item in items
        )


class Fish(FishComplete):
    """It quotes by itself; an offer a line, the note behind a tab."""

    source_template = _FISH

    def complete(self) -> str:
        """Type, value and a note."""
        word = fish_value_of(os.environ.get("COMP_WORD", ""))
        items = offers(self.get_completions(words_of(os.environ.get("COMP_ARGS", "")), word), word)
        return "\n".join(f"{item.type},{item.value}" + (f"\t{shown(item)}" if item.help else "") for item in items)


def register() -> None:
    """Answer the three shells in the place of click's own classes."""
    for kind in (Bash, Zsh, Fish):
        add_completion_class(kind)


# --- words as bash has them ---------------------------------------------------------------------------------------------


class Letter(NamedTuple):
    """One of a line, with the quote that is open before it and after it: ``'``, ``"``, ``$'`` or none."""

    text: str
    before: str
    after: str
    is_escaped: bool

    @property
    def is_bare(self) -> bool:
        """Whether no quote is about it."""
        return not (self.before or self.is_escaped)


def letters(line: str) -> list[Letter]:
    """As bash reads them."""
    found: list[Letter] = []
    quote, escaped = "", False
    for place, text in enumerate(line):
        before, was_escaped = quote, escaped
        escaped = text == "\\" and not was_escaped and quote != "'"
        if text in "'\"" and not was_escaped and not quote:
            quote = "$'" if text == "'" and line[:place].endswith("$") else text
        elif quote and text == quote[-1] and not was_escaped:
            quote = ""
        found.append(Letter(text, before, quote, was_escaped))
    return found


def raw_words(line: str) -> list[str]:
    """The words of a line up to the cursor, quotes and all; the last one, which is being typed, may be empty."""
    words = [""]
    for letter in letters(line):
        if letter.is_bare and letter.text in _SPACES:
            words += [""] if words[-1] else []
        else:
            words[-1] += letter.text
    return words


def value_of(raw: str) -> str:
    """A word without its quotes. What bash would put in the place of a variable is not known."""
    value = ""
    for letter in letters(raw):
        if letter.is_escaped:
            value += letter.text if letter.before != '"' or letter.text in '$`"\\' else f"\\{letter.text}"
        elif letter.before == letter.after and not (letter.text == "\\" and letter.before != "'"):
            value += letter.text
    return value


def left_alone(raw: str, breaks: str) -> tuple[str, str]:
    """The value of the part of a word that bash leaves as it is, and the quote that is open where it goes on."""
    start, opened, quote = 0, 0, ""
    for place, letter in enumerate(letters(raw), 1):
        if letter.before != letter.after:
            opened, quote = place, letter.after
        elif letter.is_bare and letter.text in breaks:
            start = place
    return value_of(raw[: opened if quote else start]), quote


def quoted(value: str, quote: str) -> str:
    """The value as it is typed behind an open quote, or none."""
    if quote == "'":
        return value.replace("'", "'\\''")
    if quote == '"':
        return re.sub(r'([$`"\\])', r"\\\1", value).replace("!", "\"'!'\"")
    return "".join(letter if _NO_QUOTES.match(letter) or letter.isalnum() else f"\\{letter}" for letter in value)


def fish_value_of(raw: str) -> str:
    """A word of fish without its quotes."""
    return value_of(raw.replace("$'", "'"))
