// What the parts of the page share: elements, numbers as text, announcements, work that can be
// stopped. Data only ever become text nodes, so that no text of a document can act as markup.

export const byId = (id) => document.getElementById(id);

/** A new element with these properties; children are nodes or plain text. */
export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

const NUMBERS = new Intl.NumberFormat("en");

export const number = (value) => NUMBERS.format(value);

export const counted = (count, one, several = `${one}s`) =>
  `${number(count)} ${count === 1 ? one : several}`;

export const times = (ratio) => `${Number(ratio.toFixed(1))}x`;

/** Milliseconds as a person reads them. */
export const duration = (ms) =>
  ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;

const UNITS = ["bytes", "KiB", "MiB", "GiB"];

export function bytes(count) {
  let unit = 0;
  for (; count >= 10240 && unit < UNITS.length - 1; unit++) count /= 1024;
  return `${number(Number(count.toFixed(count < 100 ? 1 : 0)))} ${UNITS[unit]}`;
}

/** Fills a <dl> with [term, description] pairs. */
export function fill(list, pairs) {
  list.replaceChildren(
    ...pairs.map(([term, text]) =>
      element("div", {}, element("dt", {}, term), element("dd", {}, text)),
    ),
  );
}

/** Shows an error in its place, or takes it away where `text` is empty. */
export function showError(place, text) {
  place.textContent = text;
  place.hidden = !text;
}

/** Tells a screen reader what others see. Emptied first, so that the same text is said again. */
export function announce(text) {
  const place = byId("announcer");
  place.textContent = "";
  setTimeout(() => (place.textContent = text), 50);
}

/** What to do about a memory that is gone, where its text is here. */
export const again = (error, source) =>
  error.status === 404 && source !== null ? " Compress the text again." : "";

export const stopped = (error) => error.name === "AbortError";

/**
 * Work that a person can stop. While it runs, the start button does nothing and the stop button is
 * shown. Returns `run(work)`, which calls `await work(signal)` unless work is under way, and
 * `run.stop()`. Neither button takes the keyboard's focus away: `back` gets it from a stop button
 * that is about to be hidden.
 */
export function stoppable(start, stop, back) {
  let running = null;
  async function run(work) {
    if (running) return;
    const controller = (running = new AbortController());
    start.setAttribute("aria-disabled", "true");
    stop.hidden = false;
    try {
      await work(controller.signal);
    } finally {
      running = null;
      start.removeAttribute("aria-disabled");
      if (document.activeElement === stop) back.focus();
      stop.hidden = true;
    }
  }
  run.stop = () => running?.abort();
  stop.addEventListener("click", run.stop);
  return run;
}
