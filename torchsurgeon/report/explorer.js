"use strict";
(() => {
  const data = JSON.parse(document.getElementById("plan").textContent);
  const { rows, frontiers, runs } = data;
  const codecs = Object.keys(frontiers);
  const [anyCodec] = codecs;
  const SLIDERS = [
    { key: "uplink_bit_s", label: "uplink", unit: "Mbit/s", scale: 1e6, low: 0.01, high: 10000, log: true },
    { key: "downlink_bit_s", label: "downlink", unit: "Mbit/s", scale: 1e6, low: 0.01, high: 10000, log: true },
    { key: "round_trip_s", label: "round trip", unit: "ms", scale: 1e-3, low: 0, high: 500, log: false },
    { key: "load", label: "server load", unit: "×", scale: 1, low: 0.05, high: 100, log: true },
    { key: "slowdown", label: "device slow-down", unit: "×", scale: 1, low: 0.05, high: 100, log: true },
  ];
  const RED = "#D55E00", DEVICE = "#CC79A7", GREYS = ["#d5d5d5", "#999999"];
  const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#f0e51f"];
  const ACROSS = 61, UP = 41;
  const [UPLINK, , , LOAD] = SLIDERS;
  const find = (id) => document.getElementById(id);
  const named = (list, name) => list.find((entry) => entry.name === name);
  const settings = { ...data.start };

  // ---- the decision, as Frontier.best makes it --------------------------------------------------------------------

  // What each of a row's columns is multiplied with. Energy and what the radio takes are 0 unless asked for.
  function weigh(s, objective) {
    const up = 8 / s.uplink_bit_s, down = (8 * data.answer_bytes) / s.downlink_bit_s;
    const weights = {
      slowdown: s.slowdown, load: s.load, up, down, throughput: objective.throughput, joules: objective.energy,
      device: objective.latency * s.slowdown,
      bytes: objective.latency * up,
      server: objective.latency * s.load + objective.server_time,
      crosses: objective.latency * (s.round_trip_s + down),
    };
    if (objective.energy) {
      const radio = named(data.links, s.link).radio;
      weights.bytes += objective.energy * up * (radio.up_w_per_bit_s * s.uplink_bit_s + radio.base_w);
      weights.crosses +=
        objective.energy * (down * (radio.down_w_per_bit_s * s.downlink_bit_s + radio.base_w) + radio.tail_j);
    }
    return weights;
  }

  function cost(row, w) {
    const device = row.head_s + row.encode_s, server = row.tail_s + row.decode_s, crosses = row.on_device ? 0 : 1;
    let sum = device * w.device + row.size_bytes * w.bytes + server * w.server + crosses * w.crosses;
    if (w.joules) sum += row.device_j * w.joules;
    if (w.throughput) {
      const slowest = Math.max(device * w.slowdown, row.size_bytes * w.up, server * w.load, crosses * w.down);
      sum += w.throughput * slowest;
    }
    return sum;
  }

  // The position of the cheapest of some rows, of equal ones the first; -1 when none keeps to the limits.
  function decide(positions, s) {
    const weights = weigh(s, named(data.objectives, s.objective));
    const limits = [["latency_s", "latency"], ["energy_j", "energy"]]
      .filter(([limit]) => data.limits[limit] !== null)
      .map(([limit, name]) => [data.limits[limit], weigh(s, named(data.objectives, name))]);
    let best = -1, least = Infinity;
    for (const i of positions) {
      const value = cost(rows[i], weights);
      if (value < least && limits.every(([most, w]) => cost(rows[i], w) <= most)) [best, least] = [i, value];
    }
    return best;
  }

  function terms(row, s) {
    const head = s.slowdown * row.head_s, encode = s.slowdown * row.encode_s;
    if (row.on_device) {
      const all = head + encode;
      return { head: all, encode: 0, uplink: 0, decode: 0, tail: 0, downlink: 0, interval: all, radio: 0 };
    }
    const up = (8 * row.size_bytes) / s.uplink_bit_s, down = (8 * data.answer_bytes) / s.downlink_bit_s;
    const decode = s.load * row.decode_s, tail = s.load * row.tail_s, { radio } = named(data.links, s.link);
    return {
      head, encode, uplink: s.round_trip_s / 2 + up, decode, tail, downlink: s.round_trip_s / 2 + down,
      interval: Math.max(head + encode, up, tail + decode, down),
      radio: radio && up * (radio.up_w_per_bit_s * s.uplink_bit_s + radio.base_w) +
        down * (radio.down_w_per_bit_s * s.downlink_bit_s + radio.base_w) + radio.tail_j,
    };
  }

  // ---- text -------------------------------------------------------------------------------------------------------

  // Plotly takes tags in its texts, and layers may have any name.
  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const digits = (value) => String(Number(value.toPrecision(4)));
  const scaled = (most, unit) => most >= 1 ? [1, unit] : most >= 1e-3 ? [1e3, `m${unit}`] : [1e6, `µ${unit}`];
  function quantity(value, unit) {
    if (!unit) return digits(value);
    const [scale, name] = scaled(value, unit);
    return `${digits(value * scale)} ${name}`;
  }
  const wayText = (row) =>
    row.on_device ? row.place : `${row.place} (${(row.size_bytes / 1e3).toFixed(1)} kB sent)`;

  // ---- the charts -------------------------------------------------------------------------------------------------

  const knowsEnergy = (s) => data.has_energy && named(data.links, s.link).radio !== null;
  const FONT = { family: "system-ui, sans-serif", size: 12, color: "#222" };
  const CONFIG = { responsive: true, displayModeBar: false };

  // Stacked bars of what each run's best way costs, with a star on the one chosen.
  function stack(what, title, unit, bars, parts, dots, star) {
    const totals = bars.map((bar) => parts.reduce((sum, [name]) => sum + bar.terms[name], 0));
    const [scale, name] = scaled(Math.max(...totals), unit);
    const x = bars.map((_, i) => i);
    const traces = parts
      .filter(([part]) => bars.some((bar) => bar.terms[part] > 0))
      .map(([part, color]) => ({
        type: "bar", name: part, x, y: bars.map((bar) => bar.terms[part] * scale), marker: { color },
        hoverinfo: "text",
        hovertext: bars.map((bar, i) =>
          `${escape(wayText(bar.row))}<br>${part} ${quantity(bar.terms[part], unit)} of ${quantity(totals[i], unit)}`),
      }));
    if (dots) {
      traces.push({
        type: "scatter", mode: "markers", name: "between answers of a stream", x,
        y: bars.map((bar) => bar.terms.interval * scale), marker: { symbol: "diamond", color: "#000", size: 7 },
        hoverinfo: "y",
      });
    }
    traces.push({
      type: "scatter", mode: "markers", name: "chosen", x: [star], y: [totals[star] * scale],
      marker: { symbol: "star", size: 20, color: RED, line: { color: "#fff", width: 1.5 } },
      hoverinfo: "text", hovertext: [escape(wayText(bars[star].row))],
    });
    const short = (label) => (label.length > 32 ? `${label.slice(0, 15)}…${label.slice(-15)}` : label);
    const labels = bars.map((bar) => short(bar.label));
    Plotly.react(what, traces, {
      title: { text: title, x: 0, xref: "paper", font: { size: 15 } }, font: FONT, barmode: "stack", bargap: 0.2,
      height: 320 + 5.5 * Math.max(...labels.map((label) => label.length)),
      margin: { l: 65, r: 10, t: 75, b: 20 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", traceorder: "normal" },
      xaxis: {
        tickvals: x, ticktext: labels.map(escape), tickangle: -55, automargin: true,
        range: [-0.6, x.length - 0.4],
      },
      yaxis: { title: { text: `${what} (${name})` }, range: [0, Math.max(...totals) * scale * 1.12 || 1] },
    }, CONFIG);
  }

  function spread(slider, count) {
    const [low, high] = [Math.log10(slider.low), Math.log10(slider.high)];
    return Array.from({ length: count }, (_, i) => low + ((high - low) * i) / (count - 1));
  }
  const across = spread(UPLINK, ACROSS), upwards = spread(LOAD, UP);

  // The color at a share of the way along some.
  function between(colors, share) {
    const at = share * (colors.length - 1), low = Math.min(Math.floor(at), colors.length - 2);
    const mixed = [1, 3, 5].map((k) => {
      const [a, b] = [colors[low], colors[low + 1]].map((color) => parseInt(color.slice(k, k + 2), 16));
      return Math.round(a + (b - a) * (at - low));
    });
    return `rgb(${mixed})`;
  }

  // Both ends keep their colors, so that what is between them is told apart from them at every setting.
  function colorsOf(used) {
    const kind = (i) => (rows[i].on_device ? "device" : rows[i].index === 0 ? "server" : "cut");
    return used.map((i) => {
      if (kind(i) === "device") return DEVICE;
      const alike = used.filter((other) => kind(other) === kind(i));
      const share = alike.length > 1 ? alike.indexOf(i) / (alike.length - 1) : 0.5;
      return between(kind(i) === "server" ? GREYS : VIRIDIS, share);
    });
  }

  function drawMap() {
    const chosen = upwards.map((load) => across.map((rate) =>
      decide(frontiers[settings.codec], { ...settings, load: 10 ** load, uplink_bit_s: 1e6 * 10 ** rate })));
    const used = [...new Set(chosen.flat())].filter((i) => i >= 0)
      .sort((a, b) => rows[a].index - rows[b].index || rows[b].size_bytes - rows[a].size_bytes);
    const colors = colorsOf(used);
    const rank = new Map(used.map((i, k) => [i, k]));
    const ticks = (slider, values) => ({
      tickvals: values.map(Math.log10), ticktext: values.map(String),
      range: [Math.log10(slider.low), Math.log10(slider.high)],
    });
    Plotly.react("map", [
      {
        type: "heatmap", x: across, y: upwards, z: chosen.map((line) => line.map((i) => rank.get(i) ?? null)),
        zmin: -0.5, zmax: used.length - 0.5, showscale: false, hoverinfo: "text",
        colorscale: colors.flatMap((c, k) => [[k / colors.length, c], [(k + 1) / colors.length, c]]),
        hovertext: chosen.map((line, k) => line.map((i, j) =>
          `${digits(10 ** across[j])} Mbit/s, load ${digits(10 ** upwards[k])}<br>` +
          (i < 0 ? "nothing keeps to the limits" : escape(wayText(rows[i]))))),
      },
      {
        type: "scatter", mode: "markers", x: [Math.log10(settings.uplink_bit_s / 1e6)], y: [Math.log10(settings.load)],
        marker: { symbol: "star", size: 20, color: RED, line: { color: "#fff", width: 1.5 } },
        hoverinfo: "text", hovertext: ["here"], showlegend: false,
      },
    ], {
      title: { text: "Where to cut, over uplink and server load", x: 0, xref: "paper", font: { size: 15 } },
      font: FONT, height: 430, margin: { l: 65, r: 30, t: 45, b: 50 },
      xaxis: { title: { text: "uplink (Mbit/s)" }, ...ticks(UPLINK, [0.01, 0.1, 1, 10, 100, 1000, 10000]) },
      yaxis: { title: { text: "server load (× profile)" }, ...ticks(LOAD, [0.1, 0.3, 1, 3, 10, 30, 100]) },
    }, CONFIG);
    find("legend").replaceChildren(...used.map((i, k) => {
      const [item, swatch, text] = ["li", "i", "span"].map((tag) => document.createElement(tag));
      swatch.style.background = colors[k];
      text.textContent = rows[i].place;
      item.append(swatch, text);
      return item;
    }));
  }

  function draw() {
    const objective = named(data.objectives, settings.objective), weights = weigh(settings, objective);
    const best = decide(frontiers[settings.codec], settings), choice = find("choice");
    choice.dataset.row = best;
    drawMap();
    find("latency").hidden = find("energy").hidden = best < 0;
    if (best < 0) {
      choice.textContent = "Nothing keeps to the limits on latency and energy here.";
      find("others").textContent = "";
      return;
    }
    const value = cost(rows[best], weights);
    choice.textContent = `★ ${wayText(rows[best])}: ${objective.name} ${quantity(value, objective.unit)}`;
    find("others").textContent = ["all on device", "all on server"].map((name, k) => {
      const ends = frontiers[settings.codec].filter((i) => (k ? rows[i].index === 0 : rows[i].on_device));
      if (!ends.length) return `${name} is not allowed`;
      const end = Math.min(...ends.map((i) => cost(rows[i], weights)));
      const more = 0 < value && value < end ? `, ${digits(end / value)} times as much` : "";
      return `${name}: ${quantity(end, objective.unit)}${more}`;
    }).join("; ");
    const bars = runs.map((run) => {
      const mine = run.rows.filter((i) =>
        settings.codec === anyCodec || rows[i].on_device || rows[i].codec === settings.codec);
      const i = mine.includes(best) ? best : decide(mine, settings);
      return { label: run.label, row: rows[i], terms: i < 0 ? null : terms(rows[i], settings) };
    }).filter((bar) => bar.row);
    const star = bars.findIndex((bar) => bar.row === rows[best]);
    stack("latency", "Latency of each cut", "s", bars, data.parts, objective.throughput > 0, star);
    find("energy").hidden = !knowsEnergy(settings);
    if (knowsEnergy(settings)) {
      const joules = bars.map((bar) => ({ ...bar, terms: { device: bar.row.device_j, radio: bar.terms.radio } }));
      stack("energy", "Energy of the device", "J", joules, [["device", "#0072B2"], ["radio", "#E69F00"]], false, star);
    }
  }

  // ---- the settings -----------------------------------------------------------------------------------------------

  const shown = [];
  let waiting = 0;
  function addField(label, ...inputs) {
    const field = document.createElement("label");
    field.append(label, ...inputs);
    find("settings").append(field);
  }

  function addSelect(key, label, names, changed) {
    const select = document.createElement("select");
    select.id = key;
    select.append(...names.map((name) => new Option(name, name)));
    select.value = settings[key];
    select.addEventListener("change", () => {
      settings[key] = select.value;
      changed?.();
      show();
    });
    addField(label, select);
    return select;
  }

  function addSlider(slider) {
    const range = document.createElement("input"), number = document.createElement("input");
    const position = slider.log ? Math.log10 : (value) => value;
    Object.assign(range, { type: "range", id: slider.key, min: position(slider.low), max: position(slider.high) });
    range.step = slider.log ? 0.01 : 1;
    const { low: min, high: max } = slider;
    Object.assign(number, { type: "number", id: `${slider.key}-number`, min, max, step: "any" });
    range.setAttribute("aria-label", slider.label);
    range.addEventListener("input", () => {
      settings[slider.key] = slider.scale * (slider.log ? 10 ** range.valueAsNumber : range.valueAsNumber);
      show();
    });
    number.addEventListener("change", () => {
      if (!(number.valueAsNumber >= slider.low && number.valueAsNumber <= slider.high)) return show();
      settings[slider.key] = slider.scale * number.valueAsNumber;
      return show();
    });
    shown.push(() => {
      const value = settings[slider.key] / slider.scale;
      range.value = position(value);
      number.value = digits(value);
    });
    addField(slider.label, number, slider.unit, range);
  }

  const takeLink = () => {
    const { uplink_bit_s, downlink_bit_s, round_trip_s } = named(data.links, settings.link);
    Object.assign(settings, { uplink_bit_s, downlink_bit_s, round_trip_s });
  };

  function show() {
    const energy = knowsEnergy(settings);
    for (const option of objectives.options) {
      option.disabled = named(data.objectives, option.value).energy > 0 && !energy;
    }
    if (objectives.selectedOptions[0].disabled) objectives.value = settings.objective = "latency";
    for (const refresh of shown) refresh();
    // A drag moves a slider more often than a screen shows it.
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      draw();
    });
  }

  takeLink();
  const objectives = addSelect("objective", "objective", data.objectives.map((o) => o.name));
  addSelect("codec", "codec", codecs);
  addSelect("link", "link and radio", data.links.map((link) => link.name), takeLink);
  SLIDERS.forEach(addSlider);
  find("note").textContent =
    `A bar is the best way among those that cut in its layers. Constraints: ${data.constraints}.` +
    (data.has_energy ? "" : " Energy is not known: the device's profile holds no joules.");
  show();
  draw();
  find("map").on("plotly_click", ({ points: [point] }) => {
    settings.uplink_bit_s = 1e6 * 10 ** point.x;
    settings.load = 10 ** point.y;
    show();
  });
})();
