// Differences between two texts, word by word.

// Words; characters of scripts that set no spaces between words; punctuation; spaces.
const UNSPACED = String.raw`\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}`;
const PIECES = new RegExp(String.raw`\s+|[${UNSPACED}]|[\p{L}\p{M}\p{N}_]+|.`, "gsu");
// Steps of one pass. Texts that differ more are compared in several passes, each from where the
// last one got furthest: time then grows with length times this number, not with length squared.
const MOST_STEPS = 1024;

export const SAME = "same";
export const LEFT_OUT = "left out";
export const ADDED = "added";

export const pieces = (text) => text.match(PIECES) ?? [];

/** The text's first `count` pieces, and what is behind them. */
export function firstPieces(text, count) {
  const scanner = new RegExp(PIECES);
  const found = [];
  while (found.length < count) {
    const match = scanner.exec(text);
    if (!match) return [found, ""];
    found.push(match[0]);
  }
  return [found, text.slice(scanner.lastIndex)];
}

/**
 * Runs `{kind, text, words}` that turn list `a` of pieces into list `b`: SAME in both, LEFT_OUT
 * only in `a`, ADDED only in `b`. Of a change, what was left out comes first. Spaces between two
 * changes count as changed, so that a changed phrase is one run.
 */
export function differences(a, b) {
  const steps = [];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) [i, j] = pass(a, b, i, j, steps);
  const runs = [];
  let change = { [LEFT_OUT]: [], [ADDED]: [] };
  const flush = () => {
    for (const kind of [LEFT_OUT, ADDED]) addRun(runs, kind, change[kind]);
    change = { [LEFT_OUT]: [], [ADDED]: [] };
  };
  steps.forEach(([kind, piece], at) => {
    if (kind !== SAME) {
      change[kind].push(piece);
      return;
    }
    const inside = change[LEFT_OUT].length || change[ADDED].length;
    if (inside && !piece.trim() && at + 1 < steps.length && steps[at + 1][0] !== SAME) {
      change[LEFT_OUT].push(piece);
      change[ADDED].push(piece);
      return;
    }
    flush();
    addRun(runs, SAME, [piece]);
  });
  flush();
  return runs;
}

function addRun(runs, kind, added) {
  if (!added.length) return;
  const text = added.join("");
  const words = added.filter((piece) => piece.trim()).length;
  const last = runs.at(-1);
  if (last?.kind === kind) {
    last.text += text;
    last.words += words;
  } else {
    runs.push({ kind, text, words });
  }
}

/**
 * Appends steps `[kind, piece]` of a shortest edit from (i, j), by Myers' greedy algorithm, which
 * keeps for each diagonal how far so many edits reach. Returns where they lead: to the end, or as
 * far as MOST_STEPS edits go.
 */
function pass(a, b, i, j, steps) {
  const [n, m] = [a.length - i, b.length - j];
  const middle = MOST_STEPS + 1;
  const reach = new Int32Array(2 * middle + 1);
  const trace = [];
  for (let edits = 0; ; edits++) {
    let best = -1;
    let furthest = [0, 0];
    for (let diagonal = -edits; diagonal <= edits; diagonal += 2) {
      const down = comesFromAbove(diagonal, edits, (k) => reach[middle + k]);
      let x = down ? reach[middle + diagonal + 1] : reach[middle + diagonal - 1] + 1;
      let y = x - diagonal;
      while (x < n && y < m && a[i + x] === b[j + y]) x++, y++;
      reach[middle + diagonal] = x;
      if (x <= n && y <= m && x + y > best) [best, furthest] = [x + y, [x, y]];
    }
    trace.push(reach.slice(middle - edits, middle + edits + 1));
    const [x, y] = furthest;
    if ((x === n && y === m) || edits === MOST_STEPS) {
      for (const step of backwards(a, b, i, j, furthest, trace)) steps.push(step);
      return [i + x, j + y];
    }
  }
}

const comesFromAbove = (diagonal, edits, reached) =>
  diagonal === -edits || (diagonal !== edits && reached(diagonal - 1) < reached(diagonal + 1));

/** The steps that lead to a point, from the reach of each number of edits. */
function backwards(a, b, i, j, [x, y], trace) {
  const steps = [];
  const same = (until) => {
    for (; x > until; x--, y--) steps.push([SAME, a[i + x - 1]]);
  };
  for (let edits = trace.length - 1; edits > 0; edits--) {
    const before = trace[edits - 1];
    const reached = (k) => before[k + edits - 1];
    const diagonal = x - y;
    const down = comesFromAbove(diagonal, edits, reached);
    const from = reached(down ? diagonal + 1 : diagonal - 1);
    same(down ? from : from + 1);
    if (down) {
      steps.push([ADDED, b[j + y - 1]]);
      y--;
    } else {
      steps.push([LEFT_OUT, a[i + x - 1]]);
      x--;
    }
  }
  same(0);
  return steps.reverse();
}
