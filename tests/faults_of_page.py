"""Deliberate faults of the server's page (`faults.py` has those of the rest). Its tests need a
browser: without one they skip, and every fault survives.
"""

from faults import Mutant

PAGE = "server/page"
# One selection of tests for each file, so that few are run without a fault.
SELECTIONS = {
    "main": "test_serve_page.py -m nightly -k 'pasted or dropped or marked or three_ways or times "
    "or errors_stay or stopped or token or exact'",
    "store": "test_serve_page_store.py -m nightly -k 'search or choosing or deleting or harm "
    "or begins'",
    "access": "test_serve_page_access.py -m nightly -k 'contrast or names or wider or alone "
    "or motion'",
    "modules": "test_serve_page_modules.py -m nightly",
}


def fault(what, file, text, planted, selection):
    """A fault of a file of the page."""
    return Mutant(what, f"{PAGE}/{file}", text, planted, SELECTIONS[selection])


MUTANTS = [
    # ----------------------------------------------------------------------- requests and streams
    fault(
        "each chunk of a stream is decoded for itself",
        "client.js",
        "decoder.decode(value, { stream: true })",
        "decoder.decode(value)",
        "modules",
    ),
    fault(
        "half a line's end is taken for a whole one",
        "client.js",
        r"\r(?!$)/",
        r"\r/",
        "modules",
    ),
    fault(
        "a stream that breaks off counts as ended",
        "client.js",
        'throw new ServerError("The connection was closed before the text had ended.");',
        "",
        "main",
    ),
    fault(
        "ids go into paths as they are",
        "client.js",
        "encodeURIComponent(id)",
        "id",
        "store",
    ),
    fault(
        "a token outlives its tab",
        "client.js",
        "sessionStorage.setItem(TOKEN, token)",
        "localStorage.setItem(TOKEN, token)",
        "main",
    ),
    fault(
        "the server is not told of a stop",
        "client.js",
        "        signal,\n        cache",
        "        cache",
        "main",
    ),
    # ------------------------------------------------------------------------------ the comparison
    fault(
        "spaces cut a changed phrase into words",
        "diff.js",
        "if (inside && ",
        "if (false && ",
        "modules",
    ),
    fault(
        "a pass gives up after few changes",
        "diff.js",
        "const MOST_STEPS = 1024;",
        "const MOST_STEPS = 4;",
        "modules",
    ),
    fault(
        "what is behind the last change is lost",
        "diff.js",
        "  same(0);\n",
        "",
        "modules",
    ),
    fault(
        "marks are the wrong way round",
        "page.js",
        'kind === diff.LEFT_OUT ? "del" : "ins"',
        'kind === diff.LEFT_OUT ? "ins" : "del"',
        "main",
    ),
    # --------------------------------------------------------------------------- texts and answers
    fault(
        "texts are kept unasked",
        "page.js",
        "const body = { text, keep, ",
        "const body = { text, keep: true, ",
        "main",
    ),
    fault(
        "any file is taken for a text",
        "page.js",
        "{ fatal: true }",
        "{}",
        "main",
    ),
    fault(
        "a file that misses the text replaces the page",
        "page.js",
        "  event.preventDefault();\n  const [file]",
        "  const [file]",
        "main",
    ),
    fault(
        "a memory of another text looks like this one's",
        "page.js",
        "memory.source === null || memory.source === textBox.value",
        "true",
        "main",
    ),
    fault(
        "the full text is compressed",
        "questions.js",
        "compress: false",
        "compress: true",
        "main",
    ),
    fault(
        "all columns are asked at once",
        "questions.js",
        "for (const column of columns) await column.answer(memory, body, signal);",
        "await Promise.all(columns.map((column) => column.answer(memory, body, signal)));",
        "main",
    ),
    fault(
        "the first token's time is the last one's",
        "questions.js",
        "first ??= ",
        "first = ",
        "main",
    ),
    fault(
        "an error of one column ends the others",
        "questions.js",
        "      this.#state.classList.toggle(",
        "      if (!stopped(error)) throw error;\n      this.#state.classList.toggle(",
        "main",
    ),
    # ------------------------------------------------------------------------------------ the store
    fault(
        "escape deletes",
        "documents.js",
        'dialog.returnValue !== "delete"',
        'dialog.returnValue === "cancel"',
        "store",
    ),
    fault(
        "a search goes on from another's page",
        "documents.js",
        "    this.#cursors = [null];\n",
        "",
        "store",
    ),
    fault(
        "a list whose place is gone is stuck",
        "documents.js",
        "error.status === 400 && after",
        "false",
        "store",
    ),
    fault(
        "a document's text is taken for the one in the field",
        "page.js",
        "memory?.id === chosen.id ? memory.source : null",
        "textBox.value",
        "store",
    ),
    # ------------------------------------------------------------------------- looks and keyboards
    fault("quiet words are too pale", "page.css", "--quiet: #566069", "--quiet: #8a949c", "access"),
    fault(
        "quiet words are too dark in the dark",
        "page.css",
        "--quiet: #a5b0b6",
        "--quiet: #5c666c",
        "access",
    ),
    fault(
        "long words are not cut", "page.css", "overflow-wrap: anywhere", "hyphens: auto", "access"
    ),
    fault(
        "the focus cannot be seen", "page.css", "outline: 3px solid", "outline: 0 solid", "access"
    ),
    fault(
        "marks are of colour alone",
        "page.css",
        "text-decoration: line-through",
        "text-decoration: none",
        "main",
    ),
    fault(
        "things move for everybody",
        "page.css",
        "(prefers-reduced-motion: no-preference)",
        "(min-width: 1px)",
        "access",
    ),
    fault("a field has no name", "index.html", '<label for="question">', "<label>", "access"),
    fault(
        "headings skip a level",
        "index.html",
        '<h3 id="restored-heading">Restored text</h3>',
        '<h4 id="restored-heading">Restored text</h4>',
        "access",
    ),
    fault(
        "the focus is lost with a stop button",
        "dom.js",
        "if (document.activeElement === stop) back.focus();",
        "",
        "main",
    ),
]
