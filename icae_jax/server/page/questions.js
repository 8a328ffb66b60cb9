// Questions: each is asked of the memory, of the full text and of the model alone.

import * as client from "./client.js";
import { again, announce, byId, element, fill, stoppable, stopped } from "./dom.js";
import { counted, duration, number, times } from "./dom.js";

const KEPT = 50; // questions of the history

// What each column adds to the request; null where it cannot be asked, for the reason `missing`.
const COLUMNS = [
  { title: "From memory", adds: ({ id }) => ({ memory: id }) },
  {
    title: "From the full text",
    adds: ({ source }) => (source === null ? null : { context: source, compress: false }),
    missing: "Not available: the document’s text is not on this page.",
  },
  { title: "Without the text", adds: () => ({}) },
];

export class Questions {
  #memory = null;
  #modelId;
  #run = stoppable(byId("ask"), byId("ask-stop"), byId("question"));

  constructor(modelId) {
    this.#modelId = modelId;
    byId("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const question = byId("question").value.trim();
      if (question) this.#run((signal) => this.#ask(question, signal));
    });
    byId("forget").addEventListener("click", () => {
      this.#run.stop();
      byId("history").replaceChildren();
      byId("forget").hidden = true;
      byId("question").focus();
      announce("The history is empty.");
    });
  }

  /** Later questions are about this memory, null for none. */
  setMemory(memory) {
    this.#memory = memory;
    byId("questions").hidden &&= !memory;
    byId("ask-form").hidden = !memory;
    byId("ask-first").hidden = Boolean(memory);
  }

  async #ask(question, signal) {
    const memory = this.#memory;
    const columns = COLUMNS.map((column) => new Column(column));
    this.#addToHistory(question, memory, columns);
    const body = { model: this.#modelId(), messages: [{ role: "user", content: question }] };
    const longest = Number(byId("longest").value);
    if (longest) body.max_tokens = longest;
    byId("ask-status").textContent = "Answering …";
    for (const column of columns) await column.answer(memory, body, signal);
    byId("ask-status").textContent = signal.aborted ? "Stopped." : "Answered.";
  }

  #addToHistory(question, { id, kept, ratio }, columns) {
    const named = element("bdi", { className: "id" }, id);
    const about = kept === "store" ? ["About ", named] : ["About the text"];
    const entry = element(
      "li",
      {},
      element("h3", { dir: "auto" }, question),
      element("p", { className: "quiet" }, ...about, `, ${times(ratio)} smaller`),
      element("div", { className: "columns" }, ...columns.map(({ place }) => place)),
    );
    byId("history").prepend(entry);
    byId("forget").hidden = false;
    while (byId("history").children.length > KEPT) byId("history").lastChild.remove();
  }
}

/** One answer with its times; what goes wrong with it stays here. */
class Column {
  #column;
  #state = element("p", { className: "quiet" }, "Waits for its turn.");
  #answer = element("p", { className: "words", dir: "auto" });
  #facts = element("dl", { className: "facts" });

  constructor(column) {
    this.#column = column;
    this.place = element(
      "div",
      { className: "column" },
      element("h4", {}, column.title),
      this.#answer,
      this.#state,
      this.#facts,
    );
  }

  async answer(memory, body, signal) {
    const adds = this.#column.adds(memory);
    if (!adds) {
      this.#state.textContent = this.#column.missing;
      return;
    }
    if (signal.aborted) {
      this.#state.textContent = "Stopped.";
      return;
    }
    this.#state.textContent = "Reading …";
    const text = new Text();
    this.#answer.replaceChildren(text);
    this.place.classList.add("busy");
    let [began, first, usage, reason] = [0, null, null, null];
    const sent = () => (began = performance.now());
    try {
      for await (const chunk of client.chat({ ...body, ...adds }, { signal, sent })) {
        const choice = chunk.choices?.[0];
        usage = chunk.usage ?? usage;
        reason = choice?.finish_reason ?? reason;
        if (!choice?.delta?.content) continue;
        first ??= performance.now() - began;
        text.appendData(choice.delta.content);
        this.#state.textContent = "Writing …";
      }
      this.#state.textContent = text.data
        ? reason === "length" ? "Cut at the limit of tokens." : ""
        : "The answer is empty.";
      announce(`${this.#column.title}: ${text.data.slice(0, 300) || "an empty answer"}`);
    } catch (error) {
      const remedy = adds.memory ? again(error, memory.source) : "";
      const what = `Error: ${error.message}${remedy}`;
      this.#state.textContent = stopped(error) ? "Stopped." : what;
      this.#state.classList.toggle("error", !stopped(error));
      if (!stopped(error)) announce(`${this.#column.title}: an error. ${error.message}`);
    } finally {
      this.place.classList.remove("busy");
    }
    this.#showFacts(first, performance.now() - began, usage);
  }

  #showFacts(first, total, usage) {
    const facts = [];
    if (first !== null) facts.push(["First token", duration(first)], ["Total", duration(total)]);
    if (usage) {
      facts.push(["Read", counted(usage.prompt_tokens, "token")]);
      if (usage.memory_tokens) {
        const stands = `${number(usage.memory_tokens)} for ${number(usage.context_tokens)} of text`;
        facts.push(["Of these memory", stands]);
      }
      facts.push(["Answer", counted(usage.completion_tokens, "token")]);
    }
    fill(this.#facts, facts);
  }
}
