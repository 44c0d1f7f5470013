// One's own text: on the "try" page for all features, on a feature's page for that one.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const LEVELS = 10;
  const SHOWN = 10;
  const LISTED = 30;

  // ---- small things ----
  function make(tag, properties, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (name === "class") element.className = value;
      else if (name in element && name !== "role") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }
  const hiddenCharacter = /[\p{Cc}\p{Cf}\p{Co}\p{Zl}\p{Zp}\u00a0]/u;
  const glyphs = { "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u00ad": "‑", "\u200c": "\u200c", "\u200d": "\u200d" };
  // The text with what cannot be seen made visible, as the server does it.
  function visible(text) {
    if (!hiddenCharacter.test(text)) return [text];
    return [...text].map((character) => {
      if (!hiddenCharacter.test(character)) return character;
      const code = character.codePointAt(0);
      const named = `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
      const shown = glyphs[character] || (code < 32 ? String.fromCodePoint(0x2400 + code) : named);
      return make("i", { class: character === "\n" ? "nl" : "ch" }, shown);
    });
  }
  function shown(value) {
    const size = Math.abs(value);
    const places = size < 100 ? 2 : size < 1000 ? 1 : 0;
    const fixed = { minimumFractionDigits: places, maximumFractionDigits: places };
    const text = size && size < 0.1 ? String(Number(size.toPrecision(2))) : size.toLocaleString("en", fixed);
    return value < 0 ? `−${text}` : text;
  }
  const level = (share) => Math.min(LEVELS, Math.max(1, Math.ceil(share * LEVELS)));
  const shade = (value, most) => (value ? `tok ${value < 0 ? "n" : "h"}${level(Math.abs(value) / (most || 1))}` : "tok");
  // A token alone; a space at its start or end is shown as a dot.
  function word(text) {
    const inner = text.replace(/^ +| +$/g, "");
    const dots = (n) => (n > 0 ? [make("i", { class: "ch" }, "·".repeat(n))] : []);
    if (!text) return make("i", { class: "ch" }, "rest of a character");
    if (!inner) return make("code", { class: "token" }, ...dots(text.length));
    const start = text.indexOf(inner);
    return make("code", { class: "token" }, ...dots(start), ...visible(inner), ...dots(text.length - start - inner.length));
  }
  const rightToLeft = /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/gu;
  // By most letters, as the server does it.
  function direction(list) {
    const text = list.map((token) => token.text).join("");
    const right = (text.match(rightToLeft) || []).length;
    return right > (text.match(/\p{L}/gu) || []).length - right ? "rtl" : "ltr";
  }
  // The space a token begins with stays outside its shade.
  const split = (text) => (text.length > 1 && text.startsWith(" ") ? [" ", text.slice(1)] : ["", text]);
  const plural = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

  function meter(share) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("class", "meter");
    svg.setAttribute("viewBox", "0 0 64 6");
    svg.setAttribute("width", "64");
    svg.setAttribute("height", "6");
    svg.setAttribute("aria-hidden", "true");
    for (const [name, width] of [["rail", 64], ["fill", Math.max(1.5, Math.min(share, 1) * 64)]]) {
      const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      for (const [key, value] of [["class", name], ["width", width], ["height", 6], ["rx", 3]]) rect.setAttribute(key, value);
      svg.append(rect);
    }
    return svg;
  }

  async function request(path, options) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch {
      throw new Error("The server does not answer. Is it still running?");
    }
    const data = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(data.error || `The server answered with status ${answer.status}.`);
    return [answer.status, data];
  }
  // Encode a text, waiting for the model if it is being loaded; `say` is told what is going on.
  async function encode(payload, say) {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(payload) };
    for (;;) {
      const [status, data] = await request("/api/encode", options);
      if (status !== 202) return data;
      const started = Date.now();
      for (let state = "loading"; state === "loading"; ) {
        const seconds = Math.round((Date.now() - started) / 1000);
        say(`Loading the model…${seconds >= 3 ? ` ${seconds} s` : ""}`);
        await new Promise((done) => setTimeout(done, 400));
        [, { state }] = await request("/api/model");
      }
      say("Encoding…");
    }
  }
  function problem(error) {
    return make("p", { class: "problem", role: "alert" }, error.message);
  }
  // Ctrl+Enter sends, as in many places.
  function sendOnEnter(area, form) {
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
  }

  // ---- a feature's page ----
  const trial = byId("trial");
  if (trial) {
    const out = byId("trial-result");
    const feature = Number(document.querySelector("[data-feature]").dataset.feature);
    let latest = 0;
    sendOnEnter(byId("trial-text"), trial);
    trial.addEventListener("submit", async (event) => {
      event.preventDefault();
      const turn = ++latest;
      const say = (text) => turn === latest && out.replaceChildren(make("p", { class: "note busy" }, text));
      say("Encoding…");
      try {
        const data = await encode({ text: byId("trial-text").value, feature }, say);
        if (turn !== latest) return;
        const sizes = data.tokens.map((token) => Math.abs(token.value));
        const best = sizes.indexOf(Math.max(...sizes));
        const fired = sizes.filter((size) => size > 0).length;
        const most = Math.max(data.max_value || 0, sizes[best] || 0);
        const line = make("p", { class: "text strip whole-text", dir: direction(data.tokens), tabIndex: 0, role: "group" });
        data.tokens.forEach((token, i) => {
          const [space, body] = split(token.text);
          const span = make("span", { class: shade(token.value, most), tabIndex: -1 }, ...visible(body));
          span.dataset.tip = `${token.text.trim() || "(space)"}  ${shown(token.value)}`;
          if (fired && i === best) span.classList.add("peak");
          line.append(space, span);
        });
        const summary = make("p", { class: "note" });
        if (fired) {
          const at = data.tokens[best];
          summary.append(`Fires on ${fired} of ${plural(sizes.length, "token", "tokens")}, most on `, word(at.text), ` with ${shown(at.value)}.`);
        } else summary.append(`Silent on all ${plural(sizes.length, "token", "tokens")}.`);
        out.replaceChildren(line, summary);
      } catch (error) {
        if (turn === latest) out.replaceChildren(problem(error));
      }
    });
  }

  // ---- the "try" page ----
  const form = byId("try");
  if (!form) return;
  const status = byId("status");
  const strip = byId("tokens");
  const painted = byId("painted");
  const known = new Map(); // feature -> what the server said of it
  let tokens = [];
  let chosen = -1;
  let latest = 0;
  let pinned = null;
  let overall = []; // the strongest features of the text
  let dense = new Set(); // those of its features that fire on many tokens of the index

  function paint(feature) {
    const most = feature === null
      ? Math.max(1, ...tokens.map((t) => t.n_firing))
      : Math.max(...tokens.map((t) => Math.abs(valueAt(t, feature))));
    [...strip.children].forEach((span, i) => {
      const value = feature === null ? tokens[i].n_firing : valueAt(tokens[i], feature);
      span.className = `${shade(value, most)}${i === chosen ? " chosen" : ""}`;
    });
    painted.textContent = feature === null ? "shade: how many features fire" : `shade: values of feature ${feature}`;
  }
  const valueAt = (token, feature) => (token.features.find(([index]) => index === feature) || [0, 0])[1];

  async function learn(features) {
    const missing = features.filter((feature) => !known.has(feature));
    if (!missing.length) return;
    try {
      const [, data] = await request(`/api/features?ids=${missing.join(",")}`);
      for (const row of data.rows) known.set(row.index, row);
    } catch {
      // a run without an index still shows numbers and values
    }
  }
  function rows(pairs, where) {
    const most = Math.max(...pairs.map(([, value]) => Math.abs(value)));
    const body = make("tbody");
    for (const [feature, value, at] of pairs) {
      const about = known.get(feature);
      const names = make("span", { class: "tokens" }, ...(about ? about.top_tokens.slice(0, 3).map(word) : []));
      const link = about ? make("a", { href: `/features/${feature}` }, String(feature)) : String(feature);
      const place = at === undefined ? null : make("td", { class: "at" }, "on ", word(tokens[at].text));
      const row = make("tr", {},
        make("td", { class: "idx" }, link), make("td", {}, names), place,
        make("td", { class: "num" }, shown(value), meter(Math.abs(value) / most)));
      row.addEventListener("pointerenter", () => paint(feature));
      row.addEventListener("pointerleave", () => paint(pinned));
      row.addEventListener("focusin", () => paint(feature));
      row.addEventListener("focusout", () => paint(pinned));
      row.addEventListener("click", (event) => {
        if (event.target.closest("a")) return;
        pinned = pinned === feature ? null : feature;
        for (const other of document.querySelectorAll("tr.pinned")) other.classList.remove("pinned");
        row.classList.toggle("pinned", pinned === feature);
        paint(pinned);
      });
      body.append(row);
    }
    const titles = ["Feature", "Its tokens", ...(pairs[0] && pairs[0].length > 2 ? ["Where"] : []), "Value"];
    const head = make("thead", { class: "unseen" }, make("tr", {}, ...titles.map((t) => make("th", { scope: "col", class: t === "Where" ? "where-head" : "" }, t))));
    where.replaceChildren(make("table", { class: "small neighbours paintable" }, head, body));
  }

  const sparseOnly = () => byId("sparse").checked;
  function showOverall() {
    const listed = overall.filter((row) => !(sparseOnly() && dense.has(row.index))).slice(0, LISTED);
    const pairs = listed.map((row) => [row.index, row.value, row.token]);
    if (pairs.length) rows(pairs, byId("overall"));
    else byId("overall").replaceChildren(make("p", { class: "empty" }, "No feature fires anywhere in this text."));
  }
  byId("sparse").addEventListener("change", () => {
    showOverall();
    if (chosen >= 0) choose(chosen, false);
  });

  async function choose(i, focus) {
    chosen = i;
    [...strip.children].forEach((span, j) => {
      span.setAttribute("aria-selected", String(j === i));
      span.tabIndex = j === i ? 0 : -1;
      span.classList.toggle("chosen", j === i);
    });
    if (focus) strip.children[i].focus();
    const token = tokens[i];
    const turn = latest;
    const listed = sparseOnly() ? token.features.filter(([feature]) => !dense.has(feature)) : token.features;
    const best = listed.slice(0, SHOWN);
    await learn(best.map(([feature]) => feature));
    if (turn !== latest || chosen !== i) return;
    const head = make("p", { class: "lede" }, word(token.text), ` token ${i + 1} of ${tokens.length}, `,
      token.n_firing ? `${plural(token.n_firing, "feature fires", "features fire")}` : "no feature fires");
    const table = make("div", {});
    if (best.length) rows(best, table);
    byId("at").replaceChildren(head, table);
  }

  strip.addEventListener("pointerover", (event) => {
    const span = event.target.closest("[role=option]");
    if (span && event.pointerType === "mouse" && !strip.dataset.held) choose(Number(span.dataset.i), false);
  });
  strip.addEventListener("click", (event) => {
    const span = event.target.closest("[role=option]");
    if (!span) return;
    const i = Number(span.dataset.i);
    // A click holds the choice, so that the pointer can travel to the list; a second one lets go.
    if (strip.dataset.held === String(i)) delete strip.dataset.held;
    else strip.dataset.held = String(i);
    choose(i, true);
  });
  strip.addEventListener("keydown", (event) => {
    const last = tokens.length - 1;
    const moves = { ArrowRight: chosen + 1, ArrowDown: chosen + 1, ArrowLeft: chosen - 1, ArrowUp: chosen - 1, Home: 0, End: last };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    choose(Math.min(Math.max(moves[event.key], 0), last), true);
  });

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const turn = ++latest;
    const text = byId("text").value;
    const say = (message) => turn === latest && status.replaceChildren(make("p", { class: "note busy" }, message));
    say("Encoding…");
    try {
      const data = await encode({ text }, say);
      if (turn !== latest) return;
      status.replaceChildren();
      byId("model").textContent = "Ctrl+Enter encodes, too.";
      byId("model").classList.add("keyboard");
      tokens = data.tokens;
      pinned = null;
      delete strip.dataset.held;
      for (const row of data.top) if ("density" in row) known.set(row.index, row);
      strip.replaceChildren(...tokens.map((token, i) => {
        const label = `${token.text.trim() || "space"}, ${plural(token.n_firing, "feature", "features")}`;
        const [space, body] = split(token.text);
        const span = make("span", { role: "option", "aria-selected": "false", "aria-label": label, tabIndex: -1 }, ...visible(body));
        span.dataset.i = String(i);
        return [space, span];
      }).flat());
      chosen = -1;
      strip.dir = direction(tokens);
      paint(null);
      overall = data.top;
      dense = new Set(data.dense);
      showOverall();
      byId("encoded").hidden = false;
      choose(data.top.length ? data.top[0].token : 0, false);
      history.replaceState(null, "", text.length <= 1000 ? `/try?text=${encodeURIComponent(text)}` : "/try");
    } catch (error) {
      if (turn === latest) status.replaceChildren(problem(error));
    }
  });
  sendOnEnter(byId("text"), form);
  if (byId("text").value.trim()) form.requestSubmit();
})();
