// The store's documents: search by the beginning of an id, pages, choosing, deleting.

import * as client from "./client.js";
import { announce, byId, counted, element, showError, stopped, times } from "./dom.js";

const ON_A_PAGE = 10;
const TYPING_PAUSE_MS = 250;

export class Documents {
  #writable = false;
  #current; // the id of the memory in use
  #cursors = [null]; // the ids behind which the pages up to this one begin
  #lastId = null;
  #hasMore = false;
  #loading = null;
  #on;

  /** `on.choose(memory)` and `on.deleted(id)` are called with what a person did. */
  constructor(on) {
    this.#on = on;
    let pause;
    byId("search").addEventListener("input", () => {
      clearTimeout(pause);
      pause = setTimeout(() => this.#firstPage(), TYPING_PAUSE_MS);
    });
    byId("search-form").addEventListener("submit", (event) => {
      event.preventDefault();
      clearTimeout(pause);
      this.#firstPage();
    });
    byId("next").addEventListener("click", () => {
      if (!this.#hasMore) return;
      this.#cursors.push(this.#lastId);
      this.refresh();
    });
    byId("previous").addEventListener("click", () => {
      if (this.#cursors.length < 2) return;
      this.#cursors.pop();
      this.refresh();
    });
  }

  start(writable) {
    this.#writable = writable;
    this.refresh();
  }

  #firstPage() {
    this.#cursors = [null];
    return this.refresh();
  }

  /** Fetches this page of the list again. */
  async refresh() {
    this.#loading?.abort();
    const controller = (this.#loading = new AbortController());
    const prefix = byId("search").value;
    const after = this.#cursors.at(-1);
    showError(byId("store-error"), "");
    try {
      const page = await client.documents({ prefix, after, limit: ON_A_PAGE }, controller.signal);
      if (!page.data.length && this.#cursors.length > 1) {
        this.#cursors.pop(); // the page's last document was deleted
        await this.refresh();
        return;
      }
      this.#show(page, prefix);
    } catch (error) {
      if (stopped(error)) return;
      if (error.status === 400 && after) {
        await this.#firstPage(); // the document that this page begins behind is gone
        return;
      }
      showError(byId("store-error"), `No list. ${error.message}`);
    }
  }

  #show(page, prefix) {
    this.#lastId = page.data.at(-1)?.id ?? null;
    this.#hasMore = page.has_more;
    byId("documents").replaceChildren(...page.data.map((memory) => this.#item(memory)));
    // Not `disabled`, which would take the focus from one who pages by keyboard.
    byId("next").setAttribute("aria-disabled", String(!page.has_more));
    byId("previous").setAttribute("aria-disabled", String(this.#cursors.length < 2));
    byId("next").parentElement.hidden = !page.has_more && this.#cursors.length < 2;
    const first = (this.#cursors.length - 1) * ON_A_PAGE;
    const named = prefix ? ` with ids that begin with “${prefix}”` : "";
    const more = page.has_more ? "; there are more" : "";
    byId("store-status").textContent = page.data.length
      ? `Documents ${first + 1} to ${first + page.data.length}${named}${more}.`
      : `No documents${named}.`;
  }

  #item(memory) {
    const choose = element(
      "button",
      { type: "button", className: "choose" },
      element("bdi", { className: "id" }, memory.id),
      element("span", { className: "quiet" }, this.#sizes(memory)),
    );
    choose.dataset.id = memory.id;
    choose.setAttribute("aria-pressed", String(memory.id === this.#current));
    choose.addEventListener("click", () => this.#on.choose(memory));
    const item = element("li", {}, choose);
    if (this.#writable) {
      const remove = element("button", { type: "button", className: "remove" }, "Delete");
      remove.append(element("span", { className: "unseen" }, ` ${memory.id}`));
      remove.addEventListener("click", () => this.#remove(memory.id));
      item.append(remove);
    }
    return item;
  }

  #sizes = ({ context_tokens, memory_tokens, ratio }) =>
    ` ${counted(context_tokens, "token")} in ${memory_tokens}, ${times(ratio)}`;

  /** Marks the document in use, if it is on this page of the list. */
  mark(id) {
    this.#current = id;
    for (const button of document.querySelectorAll("#documents .choose")) {
      button.setAttribute("aria-pressed", String(button.dataset.id === id));
    }
  }

  async #remove(id) {
    const dialog = byId("delete-dialog");
    byId("delete-about").replaceChildren(
      element("bdi", { className: "id" }, id),
      " goes from the store for good.",
    );
    dialog.returnValue = "";
    dialog.showModal();
    await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
    if (dialog.returnValue !== "delete") return; // the browser gives the focus back
    showError(byId("store-error"), "");
    try {
      await client.remove(id);
    } catch (error) {
      showError(byId("store-error"), `Not deleted. ${error.message}`);
      return;
    }
    this.#on.deleted(id);
    await this.refresh();
    byId("store-heading").focus();
    announce(`${id} is deleted.`);
  }
}
