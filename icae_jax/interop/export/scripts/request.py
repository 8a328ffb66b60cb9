r"""Sends one of the requests in requests.jsonl to a vLLM server. Start the server in this folder

    @SERVE@

    @USES@

--dry_run prints the JSON body and sends nothing.
"""

import argparse
import json
import pathlib
import sys
import urllib.error
import urllib.request

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("kind", choices=("ask", "restore", "chat"))
parser.add_argument("--id", help="of the text; by default the first")
parser.add_argument("--question", help="by default the first that was exported")
parser.add_argument("--url", default="@URL@")
parser.add_argument("--model", help="the server's name for what reads, if it has several")
parser.add_argument("--max_tokens", type=int)
parser.add_argument("--dry_run", action="store_true")
args = parser.parse_args()


def post(path, body):
    """The server's reply."""
    url, headers = args.url.rstrip("/") + path, {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode("utf-8"), headers)
    try:
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        message = error.read().decode("utf-8", "replace")
        sys.exit(f"request.py: {url} answered {error.code}: {message}")
    except urllib.error.URLError as error:
        sys.exit(f"request.py: {url} cannot be reached ({error.reason})")


with open(pathlib.Path(__file__).with_name("requests.jsonl"), encoding="utf-8") as lines:
    requests = [request for request in map(json.loads, lines) if request["kind"] == args.kind]
matching = [request for request in requests if args.id in (None, str(request["id"]))]
asked = [request for request in matching if args.question in (None, request["question"])]
# A prompt of embeddings has its question inside; others take any.
if asked or (args.kind != "chat" and not any("memory" in request for request in matching)):
    matching = asked
if not matching:
    known = "\n".join(f"  --id {r['id']} --question {r['question']}" for r in requests)
    sys.exit(f"request.py: no such request; {args.kind} has\n{known or '  none'}")
request, body = matching[0], matching[0]["body"]
question = request["question"] if args.question is None else args.question
if args.kind != "restore" and question is None:
    sys.exit(f"request.py: {args.kind} needs a --question")
if question != request["question"]:
    if args.kind == "chat":
        text = request["padding"] + question
        body["messages"][0]["content"][1:] = [{"type": "text", "text": text}]
    else:
        words = {"prompt": question, "add_special_tokens": False}
        ids = post("/tokenize", words)["tokens"]
        body["prompt"] = [*request["before"], *ids, *request["after"]]
if args.model:
    body["model"] = args.model
body["max_tokens"] = args.max_tokens or body["max_tokens"]
if args.dry_run:
    print(json.dumps(body, ensure_ascii=False))
    sys.exit()
reply = post(request["path"], body)
read = (reply.get("kv_transfer_params") or {}).get("memory")
if "memory" in request and read != request["memory"]:
    sys.exit("request.py: the server did not read the memory; start it with the command above")
choice = reply["choices"][0]
given = request.get("given_text", "")  # the answer's beginning, if the prompt has it
print(given + (choice["message"]["content"] if args.kind == "chat" else choice["text"]))
