// The page: the model, the token, a text that becomes a memory, the memory and what it restores.
// documents.js has the store's documents, questions.js the questions.

import * as client from "./client.js";
import * as diff from "./diff.js";
import { again, byId, element, fill, showError, stoppable, stopped } from "./dom.js";
import { bytes, counted, duration, number, times } from "./dom.js";
import { Documents } from "./documents.js";
import { Questions } from "./questions.js";

const MOST_MIB = 64; // of a file: a browser tab holds a text several times
const COMPARED = 20000; // words and spaces of a text whose differences are marked

const textForm = byId("text-form");
const textBox = byId("text");

let model = null; // as /v1/models has it
let memory = null; // the current memory object, with `source`: its text, null where it is not here

// -------------------------------------------------------------------------------------- the token

let before = null; // what had the focus when the token was asked for

client.onTokenNeeded((refused) => {
  before = document.activeElement;
  const value = byId("token-value");
  showError(byId("token-error"), refused ? "The server does not accept this token." : "");
  byId("page-status").textContent = "";
  byId("token").hidden = false;
  byId(refused ? "token-value" : "token-heading").focus();
  return new Promise((resolve) => {
    byId("token-form").onsubmit = (event) => {
      event.preventDefault();
      const token = value.value.trim();
      if (!/^[\x20-\x7e]+$/.test(token)) {
        showError(byId("token-error"), "A token has only letters, digits and signs of ASCII.");
        value.focus();
        return;
      }
      value.value = "";
      byId("token").hidden = true;
      const back = before !== document.body && before?.checkVisibility();
      (back ? before : byId("main")).focus();
      resolve(token);
    };
  });
});

// -------------------------------------------------------------------------------------- the model

async function start() {
  const status = byId("page-status");
  status.textContent = "Asking the server for its model …";
  showError(byId("page-error"), "");
  byId("retry-line").hidden = true;
  try {
    [model] = (await client.models()).data;
    showModel(model);
    status.textContent = "";
    byId("work").hidden = false;
  } catch (error) {
    status.textContent = "";
    showError(byId("page-error"), `The model is not known yet. ${error.message}`);
    byId("retry-line").hidden = false;
    return;
  }
  if (model.compressor.documents) {
    byId("sources").classList.add("two");
    byId("store").hidden = false;
    documents.start(model.compressor.writable);
  }
}

function showModel({ id, compressor }) {
  const facts = [`Model ${id}`, `method ${compressor.method}`, `base ${compressor.base}`];
  byId("model").textContent = facts.join(", ");
  document.title = `${id}: a long text in a small memory`;
  byId("keep-choice").hidden = !(compressor.documents && compressor.writable);
  const known = compressor.memory_tokens_per_segment;
  const segment = compressor.segment_tokens;
  byId("ratio-choice").hidden = !(known?.length > 1);
  byId("ratio-free").hidden = Boolean(known);
  byId("ratio-only").hidden = known?.length !== 1;
  if (!known) {
    const usual = segment / compressor.default_memory_tokens_per_segment;
    byId("ratio-number").placeholder = `${Number(usual.toFixed(1))}`;
  } else if (known.length === 1) {
    byId("ratio-only").textContent =
      `Every ${counted(segment, "token")} of text become ${counted(known[0], "memory token")}, ` +
      `about ${times(segment / known[0])} fewer.`;
  } else {
    byId("ratio-list").replaceChildren(
      ...known.map((tokens) =>
        element("option", {
          value: String(segment / tokens),
          textContent: `${times(segment / tokens)}: ${tokens} tokens for ${segment} of text`,
          selected: tokens === compressor.default_memory_tokens_per_segment,
        }),
      ),
    );
  }
}

/** `{ratio}` where a person has a choice and made one. */
function chosenRatio() {
  if (!byId("ratio-choice").hidden) return { ratio: Number(byId("ratio-list").value) };
  const typed = byId("ratio-number").value;
  return !byId("ratio-free").hidden && typed ? { ratio: Number(typed) } : {};
}

// --------------------------------------------------------------------------------------- the text

function textChanged() {
  const fits = !memory || memory.source === null || memory.source === textBox.value;
  byId("memory-stale").hidden = fits;
}

async function readFile(file) {
  const status = byId("text-status");
  showError(byId("text-error"), "");
  if (file.size > MOST_MIB * 2 ** 20) {
    showError(byId("text-error"), `${file.name} is larger than ${MOST_MIB} MiB.`);
    return;
  }
  try {
    textBox.value = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch (error) {
    const why = error instanceof TypeError ? "is not a UTF-8 text" : "cannot be read";
    showError(byId("text-error"), `${file.name} ${why}.`);
    return;
  }
  status.textContent = `Read ${file.name}: ${counted(textBox.value.length, "character")}.`;
  textChanged();
}

byId("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) readFile(file);
});

// A file that misses the text would otherwise replace the page.
const bringsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!bringsFiles(event)) return;
  event.preventDefault();
  textForm.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) textForm.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  textForm.classList.remove("dropping");
  if (!bringsFiles(event)) return;
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file && model) readFile(file);
});

textBox.addEventListener("input", textChanged);
byId("keep").addEventListener("change", (event) => {
  byId("keep-name").hidden = !event.target.checked;
});

const compressing = stoppable(byId("compress"), byId("compress-stop"), byId("compress"));

textForm.addEventListener("submit", (event) => {
  event.preventDefault();
  compressing(compressText);
});

async function compressText(signal) {
  const status = byId("text-status");
  const text = textBox.value;
  showError(byId("text-error"), "");
  if (!text.trim()) {
    showError(byId("text-error"), "There is no text yet.");
    textBox.focus();
    return;
  }
  const keep = !byId("keep-choice").hidden && byId("keep").checked;
  const body = { text, keep, ...chosenRatio() };
  const id = byId("keep-id").value.trim();
  if (keep && id) body.id = id;
  status.textContent = "Compressing …";
  try {
    const written = await client.compress(body, signal);
    setMemory(written, text);
    status.textContent =
      `${number(written.context_tokens)} tokens became ` +
      `${counted(written.memory_tokens, "memory token")}. The memory is below.`;
    if (keep) documents.refresh();
  } catch (error) {
    status.textContent = stopped(error) ? "Stopped." : "";
    if (!stopped(error)) showError(byId("text-error"), `Not compressed. ${error.message}`);
  }
}

// ------------------------------------------------------------------------------------- the memory

/** Makes a memory the current one, or none with null; `source` is its text where it is here. */
function setMemory(chosen, source) {
  restoring.stop();
  memory = chosen && { ...chosen, source };
  byId("memory").hidden = !memory;
  questions.setMemory(memory);
  documents.mark(memory?.id);
  byId("restored-part").hidden = true;
  byId("restore-status").textContent = "";
  showError(byId("restore-error"), "");
  textChanged();
  if (!memory) return;
  const name = byId("memory-name");
  if (memory.kept === "store") {
    name.replaceChildren("Document ", element("bdi", { className: "id" }, memory.id));
  } else {
    name.textContent = "Of the text above, in the server’s cache until newer ones need its place.";
  }
  const share = (100 * memory.memory_tokens) / Math.max(memory.context_tokens, 1);
  byId("memory-bar").setAttribute("width", String(Math.min(100, Math.max(share, 0.3))));
  fill(byId("memory-facts"), [
    ["Text", counted(memory.context_tokens, "token")],
    ["Memory", counted(memory.memory_tokens, "memory token")],
    ["Ratio", times(memory.ratio)],
    ["Size", bytes(memory.bytes)],
  ]);
}

const restoring = stoppable(byId("restore"), byId("restore-stop"), byId("restore"));

byId("restore").addEventListener("click", () => restoring(restoreText));

async function restoreText(signal) {
  const { id, source } = memory;
  const status = byId("restore-status");
  const place = byId("restored");
  const text = new Text();
  place.replaceChildren(text);
  byId("restored-part").hidden = false;
  byId("legend").hidden = true;
  showError(byId("restore-error"), "");
  status.textContent = "Restoring …";
  const began = performance.now();
  let ending = "";
  try {
    for await (const chunk of client.restore(id, signal)) {
      if (chunk.delta) text.appendData(chunk.delta);
      if (chunk.finish_reason === "length") ending = " It ends at the limit of tokens.";
    }
    const seconds = duration(performance.now() - began);
    status.textContent = `Restored in ${seconds}.${ending} ${mark(place, source, text.data)}`;
  } catch (error) {
    if (memory?.id !== id) return; // another one is shown by now
    status.textContent = stopped(error) ? "Stopped." : "";
    if (!stopped(error)) showError(byId("restore-error"), `Not restored. ${error.message}${again(error, source)}`);
    byId("restored-part").hidden = !text.data;
  }
}

/** Marks in `place` how the restored text differs from the original; returns it in words. */
function mark(place, source, restored) {
  if (source === null) return "The original is not on this page, so no differences are marked.";
  if (source === restored) return "It equals the original.";
  const [before, restBefore] = diff.firstPieces(source, COMPARED);
  const [after, restAfter] = diff.firstPieces(restored, COMPARED);
  const runs = diff.differences(before, after);
  const count = { [diff.SAME]: 0, [diff.LEFT_OUT]: 0, [diff.ADDED]: 0 };
  const nodes = runs.map(({ kind, text, words }) => {
    count[kind] += words;
    if (kind === diff.SAME) return text;
    const said = element("span", { className: "unseen" }, `[${kind}: `);
    const end = element("span", { className: "unseen" }, "] ");
    return element(kind === diff.LEFT_OUT ? "del" : "ins", {}, said, text, end);
  });
  place.replaceChildren(...nodes, restAfter);
  byId("legend").hidden = false;
  const [came, missing] = [count[diff.SAME], count[diff.LEFT_OUT]];
  const limit = ` Only the first ${number(COMPARED)} words and spaces are compared.`;
  const cut = restBefore || restAfter ? limit : "";
  return (
    `${number(came)} of the original’s ${counted(came + missing, "word")} came back. ` +
    `Missing: ${number(missing)}, new: ${number(count[diff.ADDED])}.${cut}`
  );
}

// -------------------------------------------------------------------------------------- all parts

const questions = new Questions(() => model.id);
const documents = new Documents({
  choose(chosen) {
    setMemory(chosen, memory?.id === chosen.id ? memory.source : null);
    byId("memory-heading").focus();
  },
  deleted(id) {
    if (memory?.id === id) setMemory(null, null);
  },
});

byId("retry").addEventListener("click", start);
start();
