// The server's HTTP interface: requests, errors, the token, streams.

const TOKEN = "icae.token";

/** What a person can read of a request that failed; status 0 where the server said nothing. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = "ServerError";
    this.status = status;
  }
}

// -------------------------------------------------------------------------------------- the token

let token = null;
try {
  token = sessionStorage.getItem(TOKEN);
} catch {
  // A browser that keeps nothing: the token lives as long as the page.
}

let askForToken = () => Promise.reject(new ServerError("The server asks for a token.", 401));
let asking = null;

/** `ask(refused)` gives a promise of a token; `refused` is true where one was given in vain. */
export function onTokenNeeded(ask) {
  askForToken = ask;
}

/** Another token than `used`, which the server did not take. All that wait ask a person once. */
async function newToken(used) {
  if (token !== used) return;
  asking ??= askForToken(used !== null).finally(() => (asking = null));
  token = await asking;
  try {
    sessionStorage.setItem(TOKEN, token);
  } catch {
    // As above.
  }
}

/** `promise`, or an AbortError as soon as the signal says so. */
function unlessStopped(promise, signal) {
  if (!signal) return promise;
  return new Promise((resolve, reject) => {
    const stop = () => reject(new DOMException("stopped", "AbortError"));
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
    promise.then(resolve, reject);
  });
}

// --------------------------------------------------------------------------------------- requests

/** The response of one request; `sent` is called whenever it goes out, also after a token. */
async function request(method, path, { body, signal, sent } = {}) {
  for (;;) {
    const used = token;
    const headers = {};
    if (used !== null) headers.Authorization = `Bearer ${used}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    sent?.();
    let response;
    try {
      response = await fetch(path, {
        method,
        headers,
        signal,
        cache: "no-store",
        body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server does not answer. Is it still running?");
    }
    if (response.status !== 401) {
      if (!response.ok) throw await failure(response);
      return response;
    }
    await unlessStopped(newToken(used), signal);
  }
}

async function failure(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not the server's own form: something between it and the page answered.
  }
  message = String(message || `The server answered with status ${response.status}.`);
  const wait = response.headers.get("Retry-After");
  if (wait) message += ` Try again in ${wait} s.`;
  return new ServerError(message, response.status);
}

async function json(method, path, options) {
  const response = await request(method, path, options);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server's answer broke off, or is not JSON.");
  }
}

const memoryPath = (id) => `v1/memories/${encodeURIComponent(id)}`;

export const models = () => json("GET", "v1/models");

export const compress = (body, signal) => json("POST", "v1/memories", { body, signal });

export const remove = (id) => json("DELETE", memoryPath(id));

/** A page of the store's documents whose ids begin with `prefix`, behind the id `after`. */
export function documents({ prefix, after, limit }, signal) {
  const query = new URLSearchParams({ limit });
  if (prefix) query.set("prefix", prefix);
  if (after) query.set("after", after);
  return json("GET", `v1/memories?${query}`, { signal });
}

/** The text of a memory as it comes: chunks with `delta` and `finish_reason`. */
export const restore = (id, signal) => stream(`${memoryPath(id)}/restore`, {}, { signal });

/** An answer as it comes: chunks of a chat completion, the last with `usage`. */
export const chat = (body, options) =>
  stream("v1/chat/completions", { ...body, stream_options: { include_usage: true } }, options);

// ---------------------------------------------------------------------------------------- streams

async function* stream(path, body, options) {
  const response = await request("POST", path, { ...options, body: { ...body, stream: true } });
  try {
    for await (const data of serverEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(String(chunk.error.message));
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    if (error instanceof SyntaxError) throw new ServerError("The server sent what is not JSON.");
    throw new ServerError("The connection broke off before the text had ended.");
  }
  throw new ServerError("The connection was closed before the text had ended.");
}

/** The data of each server-sent event of a byte stream, whose chunks may end anywhere. */
export async function* serverEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (let ended = false; !ended; ) {
      const { done, value } = await reader.read();
      ended = done;
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A "\r" at the end may be the first half of a "\r\n".
      const lines = rest.split(ended ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
