"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const facts = JSON.parse($("facts").textContent);
  const T = facts.tokens.length;
  const label = (token) => facts.labels[token];

  // Return an element with attributes and children; a string becomes text, never markup.
  function make(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function percent(p) {
    if (p === null) return "not finite";
    return (p >= 0.995 ? "100" : Number((100 * p).toPrecision(p >= 0.0995 ? 3 : 2))) + " %";
  }

  const bits = (p) => (p === null ? "" : ` · ${p > 0 ? (-Math.log2(p)).toFixed(1) : "∞"} bits`);

  // ---- the box beside the pointer ----

  const tip = $("tip");

  function showTip(event, ...children) {
    tip.replaceChildren(...children);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const x = event.clientX + 18, y = event.clientY + 18;
    tip.style.left = Math.max(6, x + width > innerWidth - 8 ? event.clientX - width - 14 : x) + "px";
    tip.style.top = Math.max(6, y + height > innerHeight - 8 ? event.clientY - height - 14 : y) + "px";
  }

  // Call describe(target) for whatever matches `selector` below the pointer, and show the elements that it returns.
  function explains(container, selector, describe) {
    const show = (event) => {
      const target = event.target.closest(selector);
      const found = target && container.contains(target) ? describe(target) : null;
      if (found) showTip(event, ...found); else tip.hidden = true;
    };
    container.addEventListener("pointermove", show);
    container.addEventListener("pointerdown", show);
    container.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
  addEventListener("scroll", () => { tip.hidden = true; }, true);

  // One row for each (label, probability), with a bar; `hit` marks the token that follows.
  function rows(entries) {
    const made = entries.map(([name, p, hit, colour]) => {
      const bar = make("u");
      bar.style.width = 90 * Math.min(1, p || 0) + "px";
      if (colour) bar.style.background = colour;
      return make("div", { class: hit ? "row hit" : "row" }, make("b", {}, name), make("span", {}, percent(p)), bar);
    });
    return make("div", { class: "rows" }, ...made);
  }

  function best(prediction, t) {
    const next = facts.tokens[t + 1];
    return rows(prediction.best[t].map((token, i) => [label(token), prediction.p[t][i], token === next]));
  }

  // ---- the text ----

  const text = $("text");
  const output = facts.output;
  explains(text, ".token", (span) => {
    const t = [...text.children].indexOf(span);
    if (t === 0) return [make("strong", {}, label(facts.tokens[0])), make("small", {}, "opens the text; nothing predicts it")];
    const last = t === T;
    const title = make("strong", {}, last ? "what follows the text?" : label(facts.tokens[t]));
    const of = last ? "" : `token ${t} · id ${facts.tokens[t]} · ${percent(output.next[t - 1])}, rank ${output.rank[t - 1]}` + bits(output.next[t - 1]);
    const entropy = facts.entropy[t - 1];
    const expected = `the model expected (entropy ${entropy === null ? "not finite" : entropy.toFixed(1) + " bits"}):`;
    return [title, make("small", {}, of), make("small", {}, expected), best(output, t - 1)];
  });

  // ---- the logit lens ----

  explains($("lens"), "tbody td", (cell) => {
    const row = cell.parentElement.sectionRowIndex, t = cell.cellIndex - 1, each = facts.lens[row];
    const where = row === 0 ? "from the embeddings" : `after layer ${row - 1}`;
    const parts = [make("strong", {}, label(each.best[t][0])), make("small", {}, `${where}, to follow ${label(facts.tokens[t])} (token ${t})`), best(each, t)];
    if (t + 1 < T) parts.push(make("small", {}, `${label(facts.tokens[t + 1])} follows: ${percent(each.next[t])}, rank ${each.rank[t]}`));
    return parts;
  });

  // ---- the routers ----

  const routes = $("routes");
  if (routes) {
    explains(routes, "tbody td", (cell) => {
      const layer = facts.routers[cell.parentElement.sectionRowIndex], t = cell.cellIndex - 1;
      const order = [...layer.chosen[t].keys()].sort((a, b) => layer.weights[t][b] - layer.weights[t][a]);
      const shown = order.filter((c) => layer.chosen[t][c] < layer.experts).slice(0, 12).map((c) => {
        const name = `expert ${layer.chosen[t][c]}` + (layer.kept[t][c] ? "" : ", dropped");
        return [name, layer.weights[t][c], false, `var(--e${layer.chosen[t][c]})`];
      });
      return [make("strong", {}, label(facts.tokens[t])), make("small", {}, `token ${t} · layer ${layer.layer} · weights of its experts`), rows(shown)];
    });
    const buttons = [...$("experts").querySelectorAll("button")];
    buttons.forEach((button, expert) => button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(on && other === button)));
      [...routes.querySelectorAll("tbody tr")].forEach((row, i) => [...row.cells].slice(1).forEach((cell, t) => {
        cell.classList.toggle("faded", on && !facts.routers[i].chosen[t].includes(expert));
      }));
    }));
  }

  // ---- attention maps ----

  const buttons = [...$("maps-of-heads").querySelectorAll(".map")];
  const large = $("map"), looks = $("looks"), says = $("says");
  const places = [];  // (layer, head) of each button, and where its bytes begin
  let bytes, chosen = 0, query = T - 1, key = null;
  {
    let at = 0;
    facts.attention.forEach(({ heads, sinks }, layer) => {
      for (let head = 0; head < heads; head++) places.push({ layer, head, at: at + head * T * (T + 1) / 2, sinks: sinks ? at + heads * T * (T + 1) / 2 + head * T : null });
      at += heads * (T * (T + 1) / 2 + (sinks ? T : 0));
    });
  }
  const byte = (place, q, k) => (k > q ? 0 : bytes[place.at + q * (q + 1) / 2 + k]);
  const weight = (b) => (b / 255) ** 2;
  const windowOf = (place) => facts.attention[place.layer].window;

  function colour(name) {
    const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const hex = value.length === 4 ? [...value.slice(1)].map((c) => c + c).join("") : value.slice(1);
    return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
  }

  // Draw a map of at most `most` points on each side; a point is the largest weight in its square.
  function small(canvas, place, most = 104) {
    const n = Math.min(T, most), values = new Uint8Array(n * n);
    for (let q = 0; q < T; q++) for (let k = 0; k <= q; k++) {
      const i = Math.floor(q * n / T) * n + Math.floor(k * n / T);
      values[i] = Math.max(values[i], byte(place, q, k));
    }
    const image = new ImageData(n, n), [r, g, b] = colour("--model");
    values.forEach((value, i) => image.data.set([r, g, b, value], 4 * i));
    canvas.width = canvas.height = n;
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  const cellSize = Math.max(2, Math.min(24, Math.floor(540 / T)));
  const named = cellSize >= 10;  // whether every row and column has room for its token
  const margin = { left: 96, top: named ? 84 : 24 };

  function drawLarge() {
    const place = places[chosen], side = cellSize * T, scale = devicePixelRatio || 1;
    const width = margin.left + side + 2, height = margin.top + side + 2;
    large.width = width * scale;
    large.height = height * scale;
    large.style.width = width + "px";
    large.style.height = height + "px";
    const draw = large.getContext("2d"), rgb = (c, a) => `rgba(${c.join(",")},${a})`;
    const model = colour("--model"), ink = colour("--ink"), faint = colour("--faint"), tint = colour("--rule"), mark = colour("--line1");
    draw.scale(scale, scale);
    draw.translate(margin.left, margin.top);
    draw.fillStyle = rgb(tint, 0.55);  // what the mask hides
    const window = windowOf(place);
    for (let q = 0; q < T; q++) {
      draw.fillRect((q + 1) * cellSize, q * cellSize, side - (q + 1) * cellSize, cellSize);
      if (window && q >= window) draw.fillRect(0, q * cellSize, (q - window + 1) * cellSize, cellSize);
    }
    for (let q = 0; q < T; q++) for (let k = 0; k <= q; k++) {
      const value = byte(place, q, k);
      if (!value) continue;
      draw.fillStyle = rgb(model, value / 255);
      draw.fillRect(k * cellSize, q * cellSize, cellSize, cellSize);
    }
    draw.strokeStyle = rgb(faint, 0.4);
    draw.strokeRect(-0.5, -0.5, side + 1, side + 1);
    draw.strokeStyle = rgb(mark, 1);
    draw.strokeRect(-0.5, query * cellSize - 0.5, side + 1, cellSize + 1);
    if (key !== null) draw.strokeRect(key * cellSize - 0.5, -0.5, cellSize + 1, side + 1);
    draw.font = `${Math.max(10, Math.min(12, cellSize))}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace`;
    draw.textBaseline = "middle";
    const short = (t) => { const name = label(facts.tokens[t]); return name.length > 12 ? name.slice(0, 11) + "…" : name; };
    for (let t = 0; t < T; t++) {
      if (named || t === query) {
        draw.fillStyle = rgb(t === query ? mark : ink, 1);
        draw.textAlign = "right";
        draw.fillText(short(t), -7, (t + 0.5) * cellSize);
      }
      if (!named && t === key) {
        draw.fillStyle = rgb(mark, 1);
        draw.textAlign = t < T / 2 ? "left" : "right";
        draw.fillText(short(t), (t + (t < T / 2 ? 0 : 1)) * cellSize, -11);
      }
      if (named) {
        draw.save();
        draw.fillStyle = rgb(t === key ? mark : ink, 1);
        draw.translate((t + 0.5) * cellSize, -7);
        draw.rotate(-Math.PI / 2);
        draw.textAlign = "left";
        draw.fillText(short(t), 0, 0);
        draw.restore();
      }
    }
  }

  function describe() {
    const place = places[chosen], spans = [...looks.children];
    const code = (t) => make("code", {}, label(facts.tokens[t]));
    for (let t = 0; t < T; t++) {
      spans[t].style.setProperty("--a", 68 * byte(place, query, t) / 255 + "%");
      spans[t].classList.toggle("query", t === query);
    }
    const order = [...Array(query + 1).keys()].sort((a, b) => byte(place, query, b) - byte(place, query, a)).slice(0, 4);
    const parts = [code(query), ` (token ${query}) looks at `];
    order.filter((k) => byte(place, query, k)).forEach((k, i) => {
      parts.push(i ? ", " : "", code(k), k === query ? " itself " : ` (token ${k}) `, percent(weight(byte(place, query, k))));
    });
    if (place.sinks !== null) parts.push(`; to the sink ${percent(weight(bytes[place.sinks + query]))}`);
    parts.push(".");
    if (key !== null) parts.push(make("br"), "Below the pointer: ", code(key), ` (token ${key}) `, key > query ? "comes later and is hidden." : percent(weight(byte(place, query, key))));
    says.replaceChildren(...parts);
  }

  function choose(i) {
    chosen = i;
    buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(n === i)));
    const { layer, head } = places[i], [first, before, own, distance] = facts.attention[layer].habits[head];
    const habits = `on average: first token ${percent(first)}, token before ${percent(before)}, itself ${percent(own)}` + (distance === null ? "" : `; ${distance} tokens back`);
    $("chosen").replaceChildren(`Layer ${layer}, head ${head}`, make("span", {}, habits));
    update();
  }

  function update() { drawLarge(); describe(); }

  function point(event) {
    const box = large.getBoundingClientRect();
    const k = Math.floor((event.clientX - box.left - margin.left) / cellSize), q = Math.floor((event.clientY - box.top - margin.top) / cellSize);
    if (q < 0 || q >= T || k < 0 || k >= T) return;
    [query, key] = [q, k];
    update();
  }

  function drawAll() {
    buttons.forEach((button, i) => small(button.firstElementChild, places[i]));
    if (places.length) update();
  }

  async function start() {
    const packed = Uint8Array.from(atob(JSON.parse($("maps").textContent)), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    if (!places.length) return;
    looks.replaceChildren(...[...text.children].slice(0, T).map((span) => span.cloneNode(true)));
    buttons.forEach((button, i) => button.addEventListener("click", () => choose(i)));
    large.addEventListener("pointermove", point);
    large.addEventListener("pointerdown", point);
    large.addEventListener("pointerleave", () => { key = null; update(); });
    looks.addEventListener("pointerover", (event) => {
      const span = event.target.closest(".token");
      if (span) { query = [...looks.children].indexOf(span); key = null; update(); }
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    choose(0);
    drawAll();
  }
  start();
})();
