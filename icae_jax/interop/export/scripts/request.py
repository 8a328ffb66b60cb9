r"""Sends one of the requests in requests.jsonl to a vLLM server. Start the server in this folder

    @SERVE@

    python request.py ask [--id ID] [--question Q]    an exported prompt, exactly as in training
    python request.py restore [--id ID]               the text read back, if that was exported
    python request.py chat [--id ID] --question Q     any question; the server's chat template
                                                      frames memory and question

--dry_run prints the JSON body and sends nothing. Completions have long taken prompt embeddings,
chats only in newer versions of vLLM.
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

with open(pathlib.Path(__file__).with_name("requests.jsonl"), encoding="utf-8") as lines:
    requests = [request for request in map(json.loads, lines) if request["kind"] == args.kind]
matching = [request for request in requests if args.id in (None, str(request["id"]))]
if args.kind != "chat":  # a prompt has its question inside, as embeddings
    matching = [request for request in matching if args.question in (None, request["question"])]
if not matching:
    known = "\n".join(f"  --id {r['id']} --question {r['question']}" for r in requests)
    sys.exit(f"request.py: no such request; {args.kind} has\n{known or '  none'}")
request, body = matching[0], matching[0]["body"]
if args.kind == "chat" and args.question is not None:
    text = request["padding"] + args.question
    body["messages"][0]["content"][1:] = [{"type": "text", "text": text}]
if args.kind == "chat" and len(body["messages"][0]["content"]) == 1:
    sys.exit("request.py: chat needs a --question")
if args.model:
    body["model"] = args.model
body["max_tokens"] = args.max_tokens or body["max_tokens"]
if args.dry_run:
    print(json.dumps(body, ensure_ascii=False))
    sys.exit()
url = args.url.rstrip("/") + request["path"]
post = urllib.request.Request(
    url, json.dumps(body).encode("utf-8"), {"Content-Type": "application/json"}
)
try:
    with urllib.request.urlopen(post) as reply:
        choice = json.load(reply)["choices"][0]
except urllib.error.HTTPError as error:
    message = error.read().decode("utf-8", "replace")
    sys.exit(f"request.py: {url} answered {error.code}: {message}")
except urllib.error.URLError as error:
    sys.exit(f"request.py: {url} cannot be reached ({error.reason})")
print(choice["message"]["content"] if args.kind == "chat" else choice["text"])
